"""Where the KV of a prompt came from that has segments to reuse: the numbers that replies show."""

from collections.abc import Sequence
from typing import NamedTuple

from duetto.core.reuse import Reuse, TokenRange
from duetto.core.reuse_choice import word_of

UNMARKED = "nothing is marked as reusable"
AT_THE_START = "what is marked stands at the start, where the prefix cache has it, exactly"
TOO_SHORT = "too short: no token of a segment is left beside those that are computed"
ALL_CHOSEN = "every token of the segments was chosen to be computed"


class ReuseCount(NamedTuple):
    """Tokens of one prompt. Exact, reused, recomputed and computed ones are the whole of it."""

    choice: str  # "first:16"
    num_exact: int  # from the prefix cache
    num_reused: int  # of segments: their own KV, brought to its place; approximate
    num_recomputed: int  # of segments: computed in their place, as the choice wants it
    num_computed: int  # the others
    # Tokens of segments whose own KV was not there, and was computed apart, for all who come.
    num_missing: int
    why_not: str | None  # why nothing is reused; None: something is


def count_reuse(
    reuse: Reuse,
    reused: Sequence[TokenRange],
    num_prompt: int,
    *,
    num_exact: int,
    num_missing: int,
    why_not: str | None = None,
) -> ReuseCount:
    """`reused` are the positions that were not computed; `why_not` is known where none could be."""
    num_reused = sum([end - start for start, end in reused])
    # The last token is always computed, and what stands at the start is a prefix.
    movable = [(start, min(end, num_prompt - 1)) for start, end in reuse.segments if start > 0]
    num_movable = sum([max(0, end - max(start, num_exact)) for start, end in movable])
    if not num_reused and why_not is None:
        why_not = _why_not(reuse, is_movable=any(start < end for start, end in movable))
    return ReuseCount(
        word_of(reuse),
        num_exact,
        num_reused,
        num_movable - num_reused,
        num_prompt - num_exact - num_movable,
        num_missing,
        None if num_reused else why_not,
    )


def _why_not(reuse: Reuse, *, is_movable: bool) -> str:
    if not reuse.segments:
        return UNMARKED
    if all(start == 0 for start, _ in reuse.segments):
        return AT_THE_START
    return ALL_CHOSEN if is_movable and reuse.method != "first" else TOO_SHORT
