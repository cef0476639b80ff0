"""Which part of its latency a request spends the time of a step, or of a wait, in.

The parts (core/timings.py) tile the time from arrival to finish.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add, sub

from duetto.core.batch import ScheduledBatch, ScheduledRequest
from duetto.core.request import Request
from duetto.core.timings import Part

_COMPUTING = (Part.PROMPT, Part.DECODE)  # those of `RequestTimings.computed_s`


def account_step(
    batch: ScheduledBatch,
    running: Mapping[str, Request],
    now: float,
    predicted_s: float | None = None,
) -> None:
    """Give the time since the last step to one part of each running request."""
    decode, has_prompts = Part.DECODE, False
    own: dict[str, Part] = {}
    for item in batch.requests:
        computed = running.get(item.request_id)
        if computed is None:
            continue  # it ended, or lost its blocks, while the step ran
        part = own[item.request_id] = _own_part(item, computed)
        has_prompts = has_prompts or part is not decode
    for request in running.values():
        timings = request.timings
        if request.request_id in own:
            part = own[request.request_id]
        elif request.num_in_flight:
            continue  # the time is that of a later step, which computes for it
        else:
            part = Part.STALLED
        if predicted_s is not None and part in _COMPUTING:
            timings.predicted_s = (timings.predicted_s or 0.0) + predicted_s
        if has_prompts and part is decode:
            part = Part.SHARED
        timings.account(part, now)


def _own_part(item: ScheduledRequest, request: Request) -> Part:
    if item.num_computed_tokens < request.num_lost_tokens:
        return Part.PREEMPTED  # computes again what it had computed before
    is_prompt = item.num_computed_tokens < len(request.prompt_token_ids)
    return Part.PROMPT if is_prompt else Part.DECODE


def account_run(request: Request, end_times: Sequence[float]) -> None:
    """Steps, one after the other, that each computed one token of it, beside nothing but such."""
    timings = request.timings
    timings.token_times.extend(end_times)
    timings.account(Part.DECODE, end_times[0])
    gaps = map(sub, end_times[1:], end_times)
    timings.parts[Part.DECODE] = reduce(add, gaps, timings.parts[Part.DECODE])
    timings.accounted_until = end_times[-1]


class QueueClock:
    """Tells waiting for KV blocks from waiting for one's turn, for the whole queue at once.

    It is a clock that runs only while the queue stands still for want of blocks: so it costs the
    same however many wait.
    """

    def __init__(self) -> None:
        self._blocked_s = 0.0  # up to `_blocked_since`, or all of it
        self._blocked_since: float | None = None
        self._marks: dict[str, float] = {}  # what the clock showed when a request was queued

    def stand(self, *, is_blocked: bool, now: float) -> None:
        """From now on the queue stands still for want of blocks, or does not."""
        if is_blocked and self._blocked_since is not None:
            return
        self._blocked_s = self._shows(now)
        self._blocked_since = now if is_blocked else None

    def enter(self, request: Request) -> None:
        """A request is queued, at the instant up to which its time is accounted for."""
        self._marks[request.request_id] = self._shows(request.timings.accounted_until)

    def leave(self, request: Request, now: float) -> None:
        """Give the time since it was queued to a request that leaves the queue."""
        timings = request.timings
        blocked_s = self._shows(now) - self._marks.pop(request.request_id)
        if timings.num_preemptions > 0:
            timings.account(Part.PREEMPTED, now)
            return
        timings.account(Part.BLOCKS, min(now, timings.accounted_until + blocked_s))
        timings.account(Part.WAITING, now)

    def _shows(self, now: float) -> float:
        since = self._blocked_since
        return self._blocked_s if since is None else self._blocked_s + max(0.0, now - since)
