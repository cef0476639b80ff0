"""Requests are complete and checked before an engine hears of them."""

import pytest
from fakes import ByteCodec

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest, RequestTooLong
from duetto.core.request import fan_out
from duetto.core.sampling_params import SamplingParams
from duetto.engine.intake import make_request

CONFIG = SchedulerConfig(num_blocks=64, max_model_len=32, block_size=4)
EOS = 256


class TwoTokens(ByteCodec):
    """A vocabulary of x with and without a space before it."""

    vocab_size = 2
    eos_token_ids = frozenset()

    def encode(self, text, *, add_special_tokens=True):
        return [int(text.startswith(" "))]


def intake(
    prompt=(1, 2, 3),
    config=CONFIG,
    codec=None,
    *,
    default_seed=None,
    default_max_tokens=None,
    **sampling,
):
    request = make_request(
        prompt,
        SamplingParams(**sampling),
        codec=codec or ByteCodec(),
        config=config,
        request_id="r",
        arrival_time=5.0,
        default_max_tokens=default_max_tokens,
        default_seed=default_seed,
        priority=2,
        cache_salt=b"salt",
    )
    return fan_out(request)


def test_everything_is_carried_over():
    (request,) = intake(max_tokens=7, seed=3, stop_token_ids=[9])
    assert request.request_id == "r" and request.prompt_token_ids == (1, 2, 3)
    assert (request.max_tokens, request.seed, request.arrival_time) == (7, 3, 5.0)
    assert (request.priority, request.cache_salt) == (2, b"salt")
    assert request.stop_token_ids == {9, EOS}


def test_ignore_eos_leaves_the_callers_own_stop_tokens():
    (request,) = intake(ignore_eos=True, stop_token_ids=[9])
    assert request.stop_token_ids == {9}


def test_no_max_tokens_is_all_the_room_there_is():
    assert intake(max_tokens=None)[0].max_tokens == 29
    few_blocks = SchedulerConfig(num_blocks=2, max_model_len=32, block_size=4)
    (request,) = intake(max_tokens=None, config=few_blocks)
    assert request.most_tokens == 9  # the last token needs no KV
    few_blocks.check_fits(request)


def test_a_default_is_cut_to_the_room_and_what_was_asked_is_not():
    assert intake(max_tokens=None, default_max_tokens=5)[0].max_tokens == 5
    assert intake(max_tokens=None, default_max_tokens=500)[0].max_tokens == 29
    assert intake(max_tokens=7, default_max_tokens=5)[0].max_tokens == 7
    with pytest.raises(InvalidRequest, match="min_tokens"):
        intake(max_tokens=None, default_max_tokens=5, min_tokens=6)


def test_seeds_come_from_the_caller_then_the_default_then_chance():
    assert intake(seed=0, default_seed=8)[0].seed == 0
    assert intake(default_seed=8)[0].seed == 8
    assert len({intake()[0].seed for _ in range(8)}) == 8


def test_n_requests_answer_one_prompt_with_seeds_of_their_own():
    requests = intake(n=3, seed=1)
    assert [r.request_id for r in requests] == ["r-0", "r-1", "r-2"]
    assert len({r.seed for r in requests}) == 3 and requests[0].seed == 1


def test_bad_words_are_encoded_with_and_without_a_space_before():
    (request,) = intake(bad_words=["bad", "a b"])
    texts = [bytes(ids).decode() for ids in request.bad_word_ids]
    assert texts == ["bad", " bad", "a b", " a b"]


def test_a_bad_word_that_encodes_to_nothing_is_left_out():
    class Silent(ByteCodec):
        def encode(self, text, *, add_special_tokens=True):
            return []

    assert intake(bad_words=["x"], codec=Silent())[0].bad_word_ids == ()


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": ()}),
        ("prompt", {"prompt": (1, 257)}),
        ("prompt", {"prompt": (-1, 2)}),
        ("prompt", {"prompt": (1,) * 32}),
        ("prompt", {"prompt": (1,) * 99, "max_tokens": None}),
        ("max_tokens", {"max_tokens": 30}),
        ("stop_token_ids", {"stop_token_ids": [257]}),
        ("logit_bias", {"logit_bias": {300: 1.0}}),
        ("allowed_token_ids", {"allowed_token_ids": [300]}),
        ("min_tokens", {"min_tokens": 30, "max_tokens": None}),
        ("allowed_token_ids", {"allowed_token_ids": [EOS], "min_tokens": 3}),
        (
            "allowed_token_ids",
            {"allowed_token_ids": [9, EOS], "min_tokens": 1, "stop_token_ids": [9]},
        ),
        ("allowed_token_ids", {"allowed_token_ids": [ord("x"), ord("y")], "bad_words": ["x", "y"]}),
        ("allowed_token_ids", {"allowed_token_ids": [EOS, 120], "bad_words": "x", "min_tokens": 1}),
        ("min_tokens", {"min_tokens": 1, "stop_token_ids": list(range(257))}),
        ("bad_words", {"prompt": (0,), "bad_words": ["x"], "codec": TwoTokens()}),
    ],
)
def test_what_cannot_run_is_refused_by_name(field, arguments):
    with pytest.raises(InvalidRequest) as caught:
        intake(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "arguments",
    [
        {"allowed_token_ids": [EOS]},
        {"allowed_token_ids": [EOS], "min_tokens": 3, "ignore_eos": True},
        {"allowed_token_ids": [EOS, 9], "min_tokens": 3},
        {"allowed_token_ids": [ord("x")], "bad_words": ["xy"]},
        {"allowed_token_ids": [ord("x")], "logit_bias": {ord("x"): -100.0}},
        {"stop_token_ids": list(range(257))},
    ],
)
def test_what_leaves_a_token_to_sample_is_accepted(arguments):
    assert len(intake(**arguments)) == 1


def test_too_long_is_told_apart_and_has_the_numbers():
    with pytest.raises(RequestTooLong, match=r"32 tokens.*40 in"):
        intake(prompt=(1,) * 40)


def test_of_n_answers_only_the_first_scores_the_prompt():
    first, *others = intake(n=4, prompt_logprobs=2, logprobs=1, seed=7)
    assert first.sampling.prompt_logprobs == 2 and first.seed == 7
    assert [request.sampling.prompt_logprobs for request in others] == [None] * 3
    assert all(request.sampling.logprobs == 1 for request in others)
    assert len({request.seed for request in (first, *others)}) == 4
    assert len({request.request_id for request in (first, *others)}) == 4


def test_bad_words_that_were_encoded_before_are_not_encoded_again():
    class Once(ByteCodec):
        def encode(self, text, *, add_special_tokens=True):
            raise AssertionError("asked again")

    request = make_request(
        (1, 2),
        SamplingParams(bad_words=("ab",)),
        codec=Once(),
        config=CONFIG,
        request_id="r",
        arrival_time=0.0,
        bad_word_ids=((97, 98),),
    )
    assert request.bad_word_ids == ((97, 98),)
