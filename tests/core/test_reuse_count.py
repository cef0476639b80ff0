"""Where a prompt's KV came from, in numbers that add up to the prompt."""

import pytest

from duetto.core.reuse import Reuse, TokenRange
from duetto.core.reuse_count import (
    ALL_CHOSEN,
    AT_THE_START,
    TOO_SHORT,
    UNMARKED,
    ReuseCount,
    count_reuse,
)


def count(reuse: Reuse, num_prompt: int, num_exact: int = 0, **more) -> ReuseCount:
    found = count_reuse(
        reuse, reuse.reused(num_prompt), num_prompt, num_exact=num_exact, num_missing=0, **more
    )
    whole = (found.num_exact, found.num_reused, found.num_recomputed, found.num_computed)
    assert sum(whole) == num_prompt and min(whole) >= 0
    return found


def test_the_parts_are_the_prompt() -> None:
    # 4 unmarked, 10 and 20 marked, 6 unmarked
    segments = (TokenRange(4, 14), TokenRange(14, 34))
    assert count(Reuse(segments), 40) == ReuseCount("none", 0, 30, 0, 10, 0, None)
    assert count(Reuse(segments, "first", 3), 40) == ReuseCount("first:3", 0, 24, 6, 10, 0, None)
    assert count(Reuse(segments, "first", 15), 40) == ReuseCount("first:15", 0, 5, 25, 10, 0, None)
    assert count(Reuse(segments, "first", 3), 40, 4) == ReuseCount("first:3", 4, 24, 6, 6, 0, None)


def test_the_last_token_is_computed() -> None:
    assert count(Reuse((TokenRange(4, 14),)), 14) == ReuseCount("none", 0, 9, 0, 5, 0, None)


@pytest.mark.parametrize(
    ("reuse", "why"),
    [
        (Reuse(()), UNMARKED),
        (Reuse((TokenRange(0, 10),)), AT_THE_START),
        (Reuse((TokenRange(39, 40),)), TOO_SHORT),
        (Reuse((TokenRange(0, 10), TokenRange(12, 20)), "first", 8), TOO_SHORT),
    ],
)
def test_why_nothing_is_reused(reuse, why) -> None:
    assert count(reuse, 40).why_not == why
    assert count(reuse, 40, why_not="the template drops it").why_not == "the template drops it"


def test_what_the_prefix_cache_has_is_counted_once() -> None:
    """If nothing is moved, the cache may have the segments too."""
    reuse = Reuse((TokenRange(4, 14),), "first", 100)
    assert count(reuse, 20, 8) == ReuseCount("first:100", 8, 0, 6, 6, 0, TOO_SHORT)
    assert count(reuse, 20, 16) == ReuseCount("first:100", 16, 0, 0, 4, 0, TOO_SHORT)


def test_a_choice_that_wants_all_tokens() -> None:
    reuse = Reuse((TokenRange(4, 14),), "query", ratio=1)
    assert count(reuse, 20) == ReuseCount("query:1", 0, 0, 10, 10, 0, ALL_CHOSEN)
    # Then it is exact, so the prefix cache may have it.
    assert count(reuse, 20, 16) == ReuseCount("query:1", 16, 0, 0, 4, 0, ALL_CHOSEN)


def test_tokens_that_are_chosen_are_recomputed() -> None:
    reuse = Reuse((TokenRange(4, 14),), "query", ratio=0.2, num_rounds=2)
    reused = (TokenRange(5, 9), TokenRange(10, 14))
    found = count_reuse(reuse, reused, 20, num_exact=4, num_missing=10)
    assert found == ReuseCount("query:0.2:2", 4, 8, 2, 6, 10, None)
