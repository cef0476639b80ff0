"""What a caller may reuse of a prompt's KV, and what is kept of it while a request runs.

A segment is a part of a prompt that was tokenized alone. Its own KV is that of a prompt which is
the segment alone; brought to its place, it stands for the segment there, approximately
(docs/design/reuse.md). Knows no tokens' meaning and no blocks' owners.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from duetto.core.errors import InvalidRequest

ReuseMethod = Literal["none", "first"]
METHODS: tuple[ReuseMethod, ...] = get_args(ReuseMethod)


class TokenRange(NamedTuple):
    """Positions start ... end - 1."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """The segments of one prompt that may be reused, and which of their tokens are computed all the
    same: none, or the first `num_first` of each (EPIC, Hu et al., ICML 2025)."""

    segments: tuple[TokenRange, ...]  # ascending, apart from each other
    method: ReuseMethod = "none"
    num_first: int = 0

    def check(self, num_prompt: int) -> None:
        """Raises InvalidRequest for what no prompt of so many tokens can mean."""
        if self.method not in METHODS:
            accepted = ", ".join(METHODS)
            raise InvalidRequest("reuse", f"{self.method!r:.80} is not one of {accepted}")
        if self.num_first < 0 or (self.num_first and self.method != "first"):
            raise InvalidRequest("reuse", "a number of first tokens: 0 or more, with method first")
        last = 0
        for start, end in self.segments:
            if not last <= start < end <= num_prompt:
                raise InvalidRequest(
                    "reuse",
                    f"segment {start} ... {end}: segments must be ascending, apart from each other "
                    f"and within the prompt's {num_prompt} tokens, and hold a token each",
                )
            last = end

    def reused(self, num_prompt: int) -> tuple[TokenRange, ...]:
        """The positions whose KV is brought there and not computed. The segment at position 0 is a
        prefix: what is there of it is exact, and no matter of this. Nor is the last token, whose
        logits are wanted."""
        found = []
        for start, end in self.segments:
            first, last = start + self.num_first, min(end, num_prompt - 1)
            if start > 0 and first < last:
                found.append(TokenRange(first, last))
        return tuple(found)


@dataclass(slots=True, eq=False)
class Source:
    """A segment's own KV, held by the request that reuses it until it is brought to its places."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...]  # where it stands in the prompt
    hashes: Sequence[bytes]  # of its blocks, the last of which need not be full
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0  # by steps in flight too
    num_written: int = 0

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed
