"""What a load generator saw of one request: the instants from which every metric follows.

Knows neither how a request was sent (client.py) nor what is made of the instants (metrics.py).
"""

from dataclasses import dataclass
from typing import Literal

from duetto.core.draft_counts import NO_CHAINS, Chains
from duetto.core.timings import RequestTimings

RequestOutcome = Literal["ok", "failed", "aborted"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Output tokens that became visible at one instant."""

    time_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request, with all instants in seconds on one clock.

    `scheduled_s` is when the workload wanted the request to be sent, `sent_s` when it was. A client
    that is late, or that holds requests back under a concurrency limit, has sent_s > scheduled_s;
    measuring from sent_s alone would hide that wait (coordinated omission: Tene, 2013).
    """

    scheduled_s: float
    sent_s: float
    end_s: float  # the last token's instant; without tokens, when the answer or the error came
    chunks: tuple[Chunk, ...] = ()  # only chunks with tokens, in order of time
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # as the server counts; at least the sum over chunks
    num_cached_tokens: int = 0
    drafts: Chains = NO_CHAINS  # as the server tells; of some only the totals are known
    num_prompt_tokens_asked: int | None = None  # None: nobody asked for a length
    num_output_tokens_asked: int | None = None
    outcome: RequestOutcome = "ok"
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """From send to the first token; None without one."""
        return self.chunks[0].time_s - self.sent_s if self.chunks else None

    @property
    def e2e_s(self) -> float:
        """From send to the last token."""
        return self.end_s - self.sent_s

    @property
    def held_s(self) -> float:
        """What the request waited inside the client; add it to measure from the arrival."""
        return self.sent_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None below two tokens."""
        if not self.chunks or self.num_output_tokens < 2:
            return None
        return (self.end_s - self.chunks[0].time_s) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive tokens. Tokens that share a chunk are 0 apart."""
        gaps: list[float] = []
        previous: float | None = None
        for chunk in self.chunks:
            if previous is not None:
                gaps.append(chunk.time_s - previous)
            gaps.extend([0.0] * (chunk.num_tokens - 1))
            previous = chunk.time_s
        return gaps


def outcome_of(finish_reason: str | None) -> RequestOutcome:
    if finish_reason == "error":
        return "failed"
    return "aborted" if finish_reason == "abort" else "ok"


def record_from_timings(
    timings: RequestTimings,
    *,
    num_prompt_tokens: int,
    num_cached_tokens: int,
    finish_reason: str | None,
) -> RequestRecord:
    """The record of a request that ran in this process: the engine's own instants.

    Raises ValueError if the request has not ended.
    """
    if timings.finish_time is None:
        raise ValueError("the request has not ended, so it has no latency yet")
    times = timings.token_times
    return RequestRecord(
        scheduled_s=timings.arrival_time,
        sent_s=timings.arrival_time,
        end_s=times[-1] if times else timings.finish_time,
        chunks=tuple(Chunk(time, 1) for time in times),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=len(times),
        num_cached_tokens=num_cached_tokens,
        drafts=NO_CHAINS if timings.speculation is None else timings.speculation.chains,
        outcome=outcome_of(finish_reason),
        finish_reason=finish_reason,
    )
