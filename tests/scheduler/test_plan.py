from random import Random

import pytest
from fakes import make_request

from duetto.core.request import Request
from duetto.scheduler.plan import forbidden_token_ids, plan


def halfway(num_computed: int, output: list[int], **kwargs: object) -> Request:
    """A request of prompt 11..16 that has come some way."""
    request = make_request("r", range(11, 17), 8, **kwargs)  # type: ignore[arg-type]
    request.token_ids += output
    request.num_computed_tokens = num_computed
    request.block_table = [5, 2, 7]
    return request


def test_a_chunk_of_the_prompt_samples_nothing() -> None:
    item = plan(halfway(2, []), count=3)
    assert (item.token_ids, item.num_computed_tokens) == ((13, 14, 15), 2)
    assert item.block_table == (5, 2, 7)
    assert item.rows == ()


def test_the_chunk_with_the_last_token_samples() -> None:
    item = plan(halfway(4, [], seed=9), count=2)
    assert item.token_ids == (15, 16)
    assert [(row.seed, row.num_output_tokens) for row in item.rows] == [(9, 0)]


def test_a_next_token_and_a_recompute_look_alike() -> None:
    assert plan(halfway(7, [21, 22]), count=1).token_ids == (22,)
    recompute = plan(halfway(0, [21, 22]), count=8)
    assert recompute.token_ids == (11, 12, 13, 14, 15, 16, 21, 22)
    assert [row.num_output_tokens for row in recompute.rows] == [2]


@pytest.mark.parametrize(
    ("num_computed", "count", "targets"),
    [(0, 3, (12, 13, 14)), (3, 3, (15, 16)), (5, 1, ()), (0, 6, (12, 13, 14, 15, 16))],
)
def test_each_prompt_token_is_scored_by_the_position_before_it(
    num_computed: int, count: int, targets: tuple[int, ...]
) -> None:
    item = plan(halfway(num_computed, [], prompt_logprobs=2), count)
    assert item.prompt_logprob_targets == targets
    assert item.num_prompt_logprobs == 2


def test_generated_tokens_are_never_scored_as_a_prompt() -> None:
    assert plan(halfway(0, [21], prompt_logprobs=0), 7).prompt_logprob_targets == (
        12, 13, 14, 15, 16
    )  # fmt: skip
    assert plan(halfway(0, [21]), 7).prompt_logprob_targets == ()


def test_history_goes_only_to_those_who_look_at_it() -> None:
    (plain,) = plan(halfway(6, [21]), 1).rows
    (penalised,) = plan(halfway(6, [21], presence_penalty=0.5), 1).rows
    assert (plain.prompt_token_ids, plain.output_token_ids) == ((), ())
    assert penalised.prompt_token_ids == (11, 12, 13, 14, 15, 16)
    assert penalised.output_token_ids == (21,)


@pytest.mark.parametrize(("output", "expected"), [([], (2, 9)), ([21], (2, 9)), ([21, 22], ())])
def test_ends_are_forbidden_until_there_are_min_tokens(
    output: list[int], expected: tuple[int, ...]
) -> None:
    request = halfway(6, output, stop_token_ids=[9, 2], min_tokens=2)
    assert forbidden_token_ids(request) == expected


@pytest.mark.parametrize(
    ("words", "output", "expected"),
    [
        ([[5]], [], (5,)),  # a word of one token, always
        ([[21, 5]], [], ()),
        ([[21, 5]], [21], (5,)),
        ([[21, 5]], [21, 22], ()),
        ([[21, 22, 5], [22, 6]], [21, 22], (5, 6)),
        ([[16, 5]], [], ()),  # the prompt is not generated text
        ([[16, 21, 5]], [21], ()),
    ],
)
def test_the_end_of_a_bad_word_is_forbidden_after_its_beginning(
    words: list[list[int]], output: list[int], expected: tuple[int, ...]
) -> None:
    assert forbidden_token_ids(halfway(6, output, bad_word_ids=words)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_bad_words_are_found_as_by_comparing_each_of_them(seed):
    draw = Random(seed)
    words = [tuple(draw.choices(range(3), k=draw.randint(1, 4))) for _ in range(12)]
    output = draw.choices(range(3), k=draw.randint(0, 6))
    ends = {
        word[-1]
        for word in words
        if len(word) - 1 <= len(output) and output[len(output) - len(word) + 1 :] == [*word[:-1]]
    }
    found = forbidden_token_ids(halfway(6, output, bad_word_ids=words))
    assert found == tuple(sorted(ends))
