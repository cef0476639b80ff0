"""What a caller may reuse of a prompt's KV, and what is kept of it while a request runs.

A segment is a part of a prompt that was tokenized alone. Its own KV is that of a prompt which is
the segment alone; brought to its place, it stands for the segment there, approximately
(docs/design/reuse.md). Knows no tokens' meaning and no blocks' owners.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import Literal, NamedTuple, get_args

from duetto.core.errors import InvalidRequest

ReuseMethod = Literal["none", "first", "hkvd", "query"]
METHODS: tuple[ReuseMethod, ...] = get_args(ReuseMethod)
LookMethod = Literal["attention", "deviation"]
LOOKS: dict[str, LookMethod] = {"hkvd": "deviation", "query": "attention"}  # what they choose by
MAX_ROUNDS = 8
FIRST_SHARE = Fraction(7, 10)  # of what is chosen: by the question, where there are more rounds


class TokenRange(NamedTuple):
    """Positions start ... end - 1."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """The segments of one prompt that may be reused, and which of their tokens are computed all the
    same. None; or the first `num_first` of each (EPIC, Hu et al., ICML 2025); or a share `ratio` of
    all: those whose KV deviates most (`hkvd`: CacheBlend, Yao et al., EuroSys 2025), or those to
    which the question attends most (`query`: ProphetKV, 2026). With more rounds those are most of
    them, and what they attend to in turn are the others."""

    segments: tuple[TokenRange, ...]  # ascending, apart from each other
    method: ReuseMethod = "none"
    num_first: int = 0
    ratio: float | None = None  # of the tokens that `none` reuses
    num_rounds: int = 1

    def check(self, num_prompt: int) -> None:
        """Raises InvalidRequest for what no prompt of so many tokens can mean."""
        if self.method not in METHODS:
            accepted = ", ".join(METHODS)
            raise InvalidRequest("reuse", f"{self.method!r:.80} is not one of {accepted}")
        if self.num_first < 0 or (self.num_first and self.method != "first"):
            raise InvalidRequest("reuse", "a number of first tokens: 0 or more, with method first")
        self._check_ratio()
        last = 0
        for start, end in self.segments:
            if not last <= start < end <= num_prompt:
                raise InvalidRequest(
                    "reuse",
                    f"segment {start} ... {end}: segments must be ascending, apart from each other "
                    f"and within the prompt's {num_prompt} tokens, and hold a token each",
                )
            last = end

    def _check_ratio(self) -> None:
        has_look = self.method in LOOKS
        if not has_look and self.ratio is not None:
            raise InvalidRequest("reuse", f"method {self.method} takes no ratio; hkvd and query do")
        if has_look and self.ratio is None:
            raise InvalidRequest(
                "reuse", f"method {self.method} needs the ratio of tokens to compute, from 0 to 1"
            )
        if has_look and not self._has_ratio:
            raise InvalidRequest("reuse", f"a ratio must be from 0 to 1, not {self.ratio!r:.80}")
        if self.num_rounds != 1 and self.method != "query":
            raise InvalidRequest("reuse", f"method {self.method} takes no rounds; query does")
        if not 1 <= self.num_rounds <= MAX_ROUNDS:
            raise InvalidRequest(
                "reuse", f"must choose in 1 to {MAX_ROUNDS} rounds, not {self.num_rounds!r:.80}"
            )

    def reused(self, num_prompt: int) -> tuple[TokenRange, ...]:
        """The positions whose KV is brought there and not computed, or not all of it. The segment
        at position 0 is a prefix: what is there of it is exact, and no matter of this. Nor is the
        last token, whose logits are wanted."""
        found = []
        for start, end in self.segments:
            first, last = start + self.num_first, min(end, num_prompt - 1)
            if start > 0 and first < last:
                found.append(TokenRange(first, last))
        if self._has_ratio and self.ratio == 1:
            return ()  # all of it is computed: a full prefill
        return tuple(found)

    def rounds(self, num_candidates: int) -> tuple[int, ...]:
        """How many of so many tokens are chosen at the end of each round; not of those that would
        choose no more. () if that takes no look."""
        if not self._has_ratio:
            return ()
        count = ceil(Fraction(str(self.ratio)) * num_candidates)  # 0.07 of 100 are 7: not 7.000...1
        first = count if self.num_rounds == 1 else ceil(FIRST_SHARE * count)
        later = max(1, self.num_rounds - 1)
        counts = {first + ceil(Fraction(count - first) * i / later) for i in range(later + 1)}
        return tuple(sorted(counts - {0}))

    @property
    def asks_once(self) -> bool:
        """Whether the question chooses all, with what stands before its choice."""
        return self.method == "query" and self.num_rounds == 1

    @property
    def _has_ratio(self) -> bool:
        """Whether a share is chosen, and it is one."""
        return self.method in LOOKS and self.ratio is not None and 0 <= self.ratio <= 1


class Stage(NamedTuple):
    """Positions that are computed one after the other, all of which look in this way, or none."""

    runs: tuple[TokenRange, ...]  # ascending, apart from each other
    method: LookMethod | None

    @property
    def end(self) -> int:
        return self.runs[-1].end


@dataclass(slots=True, eq=False)
class Choosing:
    """How far a request is that has not chosen all tokens that it computes. A round is some stages;
    then it chooses, and progress goes back."""

    rounds: tuple[int, ...]  # how many are chosen at the end of each
    stages: tuple[Stage, ...]  # of this round
    num_done: int = 0  # rounds
    scores: dict[int, float] = field(default_factory=dict)  # by position, of looks of this round
    chosen: tuple[int, ...] = ()  # positions, ascending


class Text(NamedTuple):
    """What one or more segments of a prompt say."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...]  # where it stands in the prompt
    hashes: Sequence[bytes]  # of the blocks of its KV, the last of which need not be full


@dataclass(slots=True, eq=False)
class Source:
    """A text's own KV, held by the request that reuses it until it is brought to its places."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...]
    hashes: Sequence[bytes]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0  # by steps in flight too
    num_written: int = 0

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed
