"""The instants of one request's life, and the additive parts of its latency.

Every metric in docs/metrics.md is computed from these. Seconds on the engine's clock.
"""

import enum
from dataclasses import dataclass, field
from operator import sub

from duetto.core.cache_miss import CacheMiss, SegmentHit
from duetto.core.draft_counts import Speculation
from duetto.core.reuse_count import ReuseCount


class Part(enum.Enum):
    """What a request's time went to. At any instant a request is in exactly one of these."""

    WAITING = "waiting"  # in the queue for its turn, never computed so far
    BLOCKS = "blocks"  # the same, while the queue stood still because KV blocks were lacking
    PROMPT = "prompt"  # a step computed tokens of its own prompt (or recomputed lost ones)
    DECODE = "decode"  # a step computed its next token, with nothing but next tokens beside it
    SHARED = "shared"  # a step computed its next token beside other requests' prompts
    STALLED = "stalled"  # admitted, but the steps computed nothing for it: others had their tokens
    PREEMPTED = "preempted"  # put back into the queue, its blocks taken

    __hash__ = object.__hash__  # Enum's own is Python code, run at each step for each request


@dataclass(slots=True)
class RequestTimings:
    """Written by the Scheduler only, and by nobody once the request has ended."""

    arrival_time: float
    first_scheduled_time: float | None = None
    token_times: list[float] = field(default_factory=list)  # one instant per output token
    finish_time: float | None = None
    num_preemptions: int = 0
    cache_miss: CacheMiss | None = None  # at first admission; None: all was found that could be
    segment_hits: tuple[SegmentHit, ...] = ()  # of the segments that it may reuse, then
    predicted_s: float | None = None  # for `computed_s`, by the steps' prices; None: no prices
    speculation: Speculation | None = None  # None: no drafts were asked for
    reuse: ReuseCount | None = None  # at its end; None: no reuse was asked for
    parts: dict[Part, float] = field(default_factory=lambda: dict.fromkeys(Part, 0.0))
    accounted_until: float = field(init=False)

    def __post_init__(self) -> None:
        self.accounted_until = self.arrival_time

    def account(self, part: Part, now: float) -> None:
        """Give the time since the last call to `part`. The parts therefore tile the latency."""
        self.parts[part] += now - self.accounted_until
        self.accounted_until = now

    @property
    def computed_s(self) -> float:
        """The time of the steps that computed something new for it."""
        return self.parts[Part.PROMPT] + self.parts[Part.DECODE] + self.parts[Part.SHARED]

    @property
    def e2e_s(self) -> float | None:
        return None if self.finish_time is None else self.finish_time - self.arrival_time

    @property
    def ttft_s(self) -> float | None:
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive output tokens; one fewer than there are tokens."""
        return list(map(sub, self.token_times[1:], self.token_times))

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None below two tokens."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)
