"""Which part of its latency a request spends the time of a step in.

The parts (core/timings.py) tile the time from arrival to finish.
"""

from collections.abc import Mapping

from duetto.core.batch import ScheduledBatch, ScheduledRequest
from duetto.core.request import Request
from duetto.core.timings import Part


def account_step(batch: ScheduledBatch, running: Mapping[str, Request], now: float) -> None:
    """Give the time since the last step to one part of each running request."""
    own = {r.request_id: _own_part(r, running[r.request_id]) for r in batch.requests}
    has_prompts = any(part is not Part.DECODE for part in own.values())
    for request in running.values():
        part = own.get(request.request_id, Part.STALLED)
        if part is Part.DECODE and has_prompts:
            part = Part.SHARED
        request.timings.account(part, now)


def account_queue(request: Request, now: float) -> None:
    """Give the time since it was queued to a request that leaves the queue."""
    was_preempted = request.timings.num_preemptions > 0
    request.timings.account(Part.PREEMPTED if was_preempted else Part.WAITING, now)


def _own_part(item: ScheduledRequest, request: Request) -> Part:
    if item.num_computed_tokens < request.num_lost_tokens:
        return Part.PREEMPTED  # computes again what it had computed before
    return Part.PROMPT if item.num_computed_tokens < request.num_prompt_tokens else Part.DECODE
