"""What is remembered of steps and of requests, so that one can ask why.

Bounded: the oldest are forgotten. Lives on the event loop; knows no HTTP and no words.
"""

from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.cache_miss import CacheMiss, SegmentHit
from duetto.core.draft_counts import Speculation
from duetto.core.request import Request
from duetto.core.reuse_count import ReuseCount
from duetto.core.shape import EMPTY, BatchShape, RequestShape
from duetto.core.timings import Part

MAX_STEPS = 4096
MAX_ROWS = 2**17  # requests of all remembered steps together: about 4 MB
MAX_REQUESTS = 1024


class RememberedStep(NamedTuple):
    """A step as it is remembered. What it did for each request is numbers in one array: as many
    objects would each be looked at by every collection of garbage, which stops all threads."""

    record: StepRecord  # without its shape
    rows: "array[int]"  # of each request, what its RequestShape holds

    @classmethod
    def of(cls, record: StepRecord) -> "RememberedStep":
        rows = array("q", chain.from_iterable(record.shape.requests))
        return cls(record._replace(shape=EMPTY), rows)

    def request_shape(self, place: int) -> RequestShape:
        """What the step did for the request at this place of `request_ids`."""
        start = place * _ROW
        num_new, num_past, num_logit_rows, is_short = self.rows[start : start + _ROW]
        return RequestShape(num_new, num_past, num_logit_rows, bool(is_short))

    def shape(self) -> BatchShape:
        return BatchShape(tuple([self.request_shape(i) for i in range(len(self.rows) // _ROW)]))


_ROW = len(RequestShape._fields)


@dataclass(slots=True)
class Ended:
    """One engine request that has ended. Seconds on the engine's clock."""

    request_id: str
    name: str  # of its reply, for the client: the label that it brought, or our id
    owner: bytes  # the tenant and salt that it came with
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: str
    error: str | None
    arrival_time: float
    first_token_time: float | None
    last_token_time: float | None
    finish_time: float
    parts: dict[Part, float]
    longest_gap_s: float | None  # between two of its tokens ...
    longest_gap_end: float | None  # ... and when it ended
    num_preemptions: int
    cache_miss: CacheMiss | None
    was_admitted: bool
    computed_s: float
    predicted_s: float | None
    speculation: Speculation | None = None  # not written any more
    reuse: ReuseCount | None = None
    segment_hits: tuple[SegmentHit, ...] = ()
    reader_s: float = 0.0  # from its end until its client had taken all of a stream

    @property
    def total_s(self) -> float:
        """The E2E latency, and the client's time to take the end of it."""
        return self.finish_time - self.arrival_time + self.reader_s

    @property
    def num_computed_tokens(self) -> int:
        """Of the prompt."""
        num_reused = 0 if self.reuse is None else self.reuse.num_reused
        return self.num_prompt_tokens - self.num_cached_tokens - num_reused

    @property
    def is_first_answer(self) -> bool:
        """Of those to its prompt (core/request.py's fan_out numbers them)."""
        return self.request_id.count("-") < 2 or self.request_id.endswith("-0")


@dataclass(slots=True)
class Running:
    """One engine request that has not ended, as far as its updates have told."""

    request_id: str
    name: str
    owner: bytes
    num_prompt_tokens: int
    arrival_time: float
    num_output_tokens: int = 0


class History:
    def __init__(self, max_steps: int = MAX_STEPS, max_requests: int = MAX_REQUESTS) -> None:
        self._steps: deque[RememberedStep] = deque()
        self._num_rows = 0
        self._max_steps = max_steps
        self._max_requests = max_requests
        self._ended: OrderedDict[str, Ended] = OrderedDict()
        self._running: dict[str, Running] = {}
        self._has_forgotten = False  # steps
        self._labels: OrderedDict[tuple[bytes, str], str] = OrderedDict()  # -> the newest's our id

    def claim(self, tenant: bytes, label: str, own: str) -> str:
        """The name of a reply whose client brought `label` (or nothing: our id): the label, or,
        where a reply of the same tenant has it already, the label and a part of our id."""
        key = (tenant, label)
        is_taken = key in self._labels
        self._labels[key] = own
        self._labels.move_to_end(key)
        while len(self._labels) > 2 * self._max_requests:
            self._labels.popitem(last=False)
        return f"{label}-{own[:8]}" if is_taken else label

    def newest(self, tenant: bytes, label: str) -> str | None:
        """Our id of the last reply of a tenant that was to be called so, if it is remembered."""
        return self._labels.get((tenant, label))

    def record_step(self, record: StepRecord) -> None:
        self._steps.append(RememberedStep.of(record))
        self._num_rows += len(record.request_ids)
        while len(self._steps) > self._max_steps or self._num_rows > MAX_ROWS:
            self._num_rows -= len(self._steps.popleft().record.request_ids)
            self._has_forgotten = True

    def record_arrival(self, request: Request, name: str = "") -> None:
        """The engine is about to be given a request of the reply that its client knows as `name`,
        by default that of our id."""
        self._running[request.request_id] = Running(
            request.request_id,
            name or reply_of(request.request_id),
            request.cache_salt,
            request.num_prompt_tokens,
            request.arrival_time,
        )

    def record_update(self, request: Request, update: RequestUpdate) -> Ended | None:
        """Take in an update; all that is told of a request comes with its final one. What is then
        remembered of the request, if anything is."""
        if update.finish_reason is None:
            running = self._running.get(request.request_id)
            if running is not None:
                running.num_output_tokens += len(update.tokens)
            return None
        running = self._running.pop(request.request_id, None)
        times = update.timings
        if times is None or times.finish_time is None:
            return None
        tokens, gaps = times.token_times, times.itl_s
        gap_s = max(gaps, default=None)
        gap_end = None if gap_s is None else tokens[gaps.index(gap_s) + 1]
        ended = Ended(
            request_id=request.request_id,
            name=reply_of(request.request_id) if running is None else running.name,
            owner=request.cache_salt,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=update.num_cached_tokens,
            num_output_tokens=len(tokens),
            finish_reason=update.finish_reason.value,
            error=update.error,
            arrival_time=times.arrival_time,
            first_token_time=tokens[0] if tokens else None,
            last_token_time=tokens[-1] if tokens else None,
            finish_time=times.finish_time,
            parts=dict(times.parts),
            longest_gap_s=gap_s,
            longest_gap_end=gap_end,
            num_preemptions=times.num_preemptions,
            cache_miss=times.cache_miss,
            was_admitted=times.first_scheduled_time is not None,
            computed_s=times.computed_s,
            predicted_s=times.predicted_s,
            speculation=times.speculation,
            reuse=times.reuse,
            segment_hits=times.segment_hits,
        )
        self._ended[request.request_id] = ended
        while len(self._ended) > self._max_requests:
            self._ended.popitem(last=False)
        return ended

    def record_delivery(self, request_id: str, now: float) -> None:
        """The client of a stream has taken the last of it."""
        ended = self._ended.get(request_id)
        if ended is not None:
            ended.reader_s = max(0.0, now - ended.finish_time)

    def steps(self) -> list[RememberedStep]:
        """Oldest first."""
        return list(self._steps)

    def remembers_since(self, time: float) -> bool:
        """Whether no step that began after `time` has been forgotten."""
        return not self._has_forgotten or self._steps[0].record.start_time <= time

    def running(self, tenant: bytes) -> list[Running]:
        """The requests of a tenant that have not ended, the oldest first."""
        return [r for r in self._running.values() if r.owner.startswith(tenant)]

    def ended(self, tenant: bytes) -> list[Ended]:
        """The requests of a tenant, the one that ended last first."""
        return [e for e in reversed(self._ended.values()) if e.owner.startswith(tenant)]


def reply_of(request_id: str) -> str:
    """Our id of the reply that an engine request is a choice of: the part before the numbers."""
    return request_id.partition("-")[0]
