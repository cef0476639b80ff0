import math
from typing import Any

import pytest

from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import MAX_LOGPROBS, MAX_N, SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.min_tokens) == (1, 16, 0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        1.0, 0.0, 0.0
    )  # fmt: skip
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert (params.logprobs, params.prompt_logprobs, params.seed) == (None, None, None)
    assert params.skip_special_tokens
    assert not params.ignore_eos


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n", 0, f"n: must be from 1 to {MAX_N}, not 0"),
        ("n", MAX_N + 1, "must be from 1"),
        ("n", True, "must be a whole number, not True"),
        ("n", 1.0, "must be a whole number, not 1.0"),
        ("max_tokens", 0, "max_tokens: must be from 1"),
        ("max_tokens", "9", "must be a whole number, not '9'"),
        ("min_tokens", -1, "min_tokens: must be from 0"),
        ("min_tokens", 17, "min_tokens: 17 is more than max_tokens, 16"),
        ("temperature", -0.1, "temperature: must be from 0 to 100, not -0.1"),
        ("temperature", math.nan, "must be from 0 to 100, not nan"),
        ("temperature", math.inf, "must be from 0 to 100, not inf"),
        ("temperature", "warm", "temperature: must be a number, not 'warm'"),
        ("temperature", False, "must be a number, not False"),
        ("top_k", -2, "top_k: must be from -1"),
        ("top_p", 0.0, "top_p: must be above 0 to 1, not 0.0"),
        ("top_p", 1.5, "top_p: must be above 0 to 1"),
        ("top_p", math.nan, "top_p"),
        ("min_p", 1.01, "min_p: must be from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty: must be above 0"),
        ("presence_penalty", 2.5, "presence_penalty: must be from -2 to 2"),
        ("frequency_penalty", -3, "frequency_penalty: must be from -2 to 2"),
        ("logit_bias", {1: 101}, "logit_bias: must be from -100 to 100"),
        ("logit_bias", {1: math.nan}, "logit_bias"),
        ("logit_bias", {"1": 1}, "logit_bias: the key '1' is wrong"),
        ("logit_bias", {-1: 1}, "logit_bias: the key -1 is wrong"),
        ("logit_bias", [1], r"logit_bias: must map token ids to numbers, not \[1\]"),
        ("allowed_token_ids", [], "allowed_token_ids: must name at least one token"),
        ("allowed_token_ids", [-5], "must be from 0"),
        ("stop_token_ids", ["a"], "must be a whole number, not 'a'"),
        ("stop_token_ids", {1, 2}, "stop_token_ids: must be a list, not set"),
        ("stop", [""], "stop: must be strings of 1 to 1024 characters"),
        ("stop", ["a" * 1025], "stop: must be strings"),
        ("stop", ["a"] * 17, "stop: at most 16 strings are accepted, not 17"),
        ("stop", [1], "stop: must be strings"),
        ("bad_words", 5, "bad_words: must be a list, not int"),
        ("ignore_eos", 1, "ignore_eos: must be true or false, not 1"),
        ("include_stop_str_in_output", None, "must be true or false"),
        ("seed", 2**64, "seed: must be from"),
        ("seed", 1.5, "seed: must be a whole number"),
        ("logprobs", -2, "logprobs: must be from -1"),
        ("prompt_logprobs", True, "prompt_logprobs: must be a whole number"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(field: str, value: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", MAX_N),
        ("max_tokens", None),
        ("temperature", 0),
        ("top_k", -1),
        ("top_p", 1),
        ("min_p", 1.0),
        ("presence_penalty", -2.0),
        ("logprobs", 0),
        ("prompt_logprobs", -1),
        ("seed", -(2**63)),
        ("seed", 2**64 - 1),
    ],
)
def test_the_ends_of_each_range_are_accepted(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_lists_and_single_strings_become_tuples_and_absent_ones_empty() -> None:
    params = SamplingParams(
        stop="end",  # type: ignore[arg-type]
        bad_words=["a", "b"],  # type: ignore[arg-type]
        stop_token_ids=None,  # type: ignore[arg-type]
        allowed_token_ids=[3],  # type: ignore[arg-type]
        logit_bias=None,  # type: ignore[arg-type]
    )
    assert (params.stop, params.bad_words, params.stop_token_ids) == (("end",), ("a", "b"), ())
    assert (params.allowed_token_ids, params.logit_bias) == ((3,), {})
    assert SamplingParams(stop=None, bad_words=None).stop == ()  # type: ignore[arg-type]


def test_a_bias_is_the_callers_no_more_once_it_is_given() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = math.nan
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, False),
        ({"temperature": 0.0, "top_k": 5}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
    ],
)
def test_only_penalties_look_at_the_tokens_before(kwargs: dict[str, Any], expected: bool) -> None:
    assert SamplingParams(**kwargs).needs_history is expected


def test_all_log_probabilities_are_as_many_as_the_vocabulary_within_the_limit() -> None:
    asked = SamplingParams(logprobs=-1, prompt_logprobs=3)
    meant = asked.with_logprobs(50, 50)
    assert (meant.logprobs, meant.prompt_logprobs) == (50, 3)
    assert meant.with_logprobs(50, 50) is meant
    assert asked.with_logprobs(50, -1) == meant
    assert SamplingParams(logprobs=10**6).with_logprobs(50, -1).logprobs == 50
    with pytest.raises(InvalidRequest, match=r"logprobs: -1 is all 50 of .*; at most 49"):
        asked.with_logprobs(50, 49)
    for name in ("logprobs", "prompt_logprobs"):
        most = SamplingParams(**{name: MAX_LOGPROBS})
        assert most.with_logprobs(50, MAX_LOGPROBS) is most
        with pytest.raises(InvalidRequest, match=f"{name}: 21; at most 20 are accepted here"):
            SamplingParams(**{name: 21}).with_logprobs(50, MAX_LOGPROBS)


def test_zero_temperature_alone_is_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_a_token_outside_the_vocabulary_is_refused_by_name(field: str) -> None:
    value: Any = {10: 1.0} if field == "logit_bias" else (9, 10)
    params = SamplingParams(**{field: value})
    params.check_vocabulary(11)
    with pytest.raises(
        InvalidRequest, match=f"{field}: (token id|the key) 10 is outside the vocabulary of 10"
    ):
        params.check_vocabulary(10)
