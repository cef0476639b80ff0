"""Many steps of next tokens at once: the fast twin of `schedule` and `update`, for simulation.

Where every running request needs one token and nobody can be admitted, what the next steps will do
is known without planning them. A part of the Scheduler in a file of its own: it writes what the
Scheduler writes. Knows no executor and no clock: the caller brings the instants at which the steps
end. Equality with the slow path, field by field, is the test.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add, itemgetter, sub

from duetto.core.request import Request
from duetto.core.timings import Part
from duetto.scheduler.prefix import reusable_hashes
from duetto.scheduler.scheduler import Scheduler

_Event = tuple[int, bool, object, Request]  # step, whether it is an update, order within, whose


def num_certain_steps(scheduler: Scheduler) -> int:
    """How many of the next steps are sure to compute one token of each running request, in the
    order of `scheduler.running`, and nothing else; 0 where that is not sure.

    Certain as long as no request arrives or is aborted between them. In none of them does a request
    end, and none is preempted. It is assumed that the tokens to come stand in no prompt that waits,
    and end no request: true for a simulated executor, whose tokens stand for no text. Changes
    nothing.
    """
    running = scheduler.running
    if not running or len(running) > scheduler.config.max_num_batched_tokens:
        return 0
    if scheduler._drafts.is_on:
        return 0
    if not all(map(_is_streaming, running.values())) or _is_queue_blocked(scheduler) is None:
        return 0
    num_left = min(r.max_tokens - r.num_output_tokens for r in running.values())
    return _num_steps_with_room(scheduler, num_left - 1)


def advance(
    scheduler: Scheduler,
    start_time: float,
    end_times: Sequence[float],
    token_of: Callable[[Request], int],
) -> list[int]:
    """Run `len(end_times)` steps, at most `num_certain_steps`; step k ends at `end_times[k]`, and
    the one after begins then.

    Each gives every running request its `token_of(request)`. Returns how many blocks were free
    after each step.
    """
    is_blocked = bool(_is_queue_blocked(scheduler))
    for time in (start_time, *end_times[:-1]):
        scheduler._queue_clock.stand(is_blocked=is_blocked, now=time)
    num_free: list[int] = []
    first = {r.request_id: r.num_tokens for r in scheduler.running.values()}  # at the first step
    for step, is_update, _, request in _block_events(scheduler, len(end_times)):
        num_free += [scheduler.pool.num_free] * (step - len(num_free))
        if is_update:
            _compute(request, first[request.request_id] + step, token_of(request))
            scheduler._publish(request)  # full blocks only: that is when it is an event
        else:
            request.block_table += scheduler.pool.allocate(1)
    num_free += [scheduler.pool.num_free] * (len(end_times) - len(num_free))
    gaps = list(map(sub, end_times[1:], end_times))
    for request in scheduler.running.values():
        _compute(request, first[request.request_id] + len(end_times) - 1, token_of(request))
        timings = request.timings
        timings.token_times.extend(end_times)
        timings.account(Part.DECODE, end_times[0])
        timings.parts[Part.DECODE] = reduce(add, gaps, timings.parts[Part.DECODE])
        timings.accounted_until = end_times[-1]
    return num_free


def _compute(request: Request, num_computed: int, token_id: int) -> None:
    """Let it have `num_computed` tokens computed, and the next one sampled."""
    request.token_ids += [token_id] * (num_computed + 1 - request.num_tokens)
    request.num_computed_tokens = request.num_written_tokens = num_computed


def _is_streaming(request: Request) -> bool:
    """Whether all that it needs is its next token, which has a predecessor."""
    if request.num_in_flight:
        return False
    return request.num_uncomputed_tokens == 1 and request.num_output_tokens > 0


def _is_queue_blocked(scheduler: Scheduler) -> bool | None:
    """Whether it is for want of blocks that nobody is admitted; None if somebody may be.

    Holds as long as requests only grow. Places and tokens of budget stay as they are. Room for the
    first in line can only shrink: each block taken is one less that is free, and one that it could
    have reused is one more to take.
    """
    config, num_running = scheduler.config, len(scheduler.running)
    waiting = next(scheduler._candidates(), None)
    if waiting is None:
        return False
    if scheduler._turns.is_contended(scheduler.waiting):
        return None  # one client may have to give a place to another
    if num_running >= min(config.max_num_seqs, config.max_num_batched_tokens):
        return False
    if scheduler._hashes_being_computed():
        return None  # somebody may be passed over, and somebody else be the first
    cached = scheduler.pool.find(reusable_hashes(waiting, config))
    if scheduler._has_room(waiting, cached):
        return None
    if not config.enable_chunked_prefill:
        return None  # what it needs of the budget may change too; a chunk needs one token of it
    return True


def _num_steps_with_room(scheduler: Scheduler, most: int) -> int:
    """The largest number of steps, up to `most`, for which there are free blocks."""
    blocks_for = scheduler.config.num_blocks_for
    held = [(r.num_tokens - 1, len(r.block_table)) for r in scheduler.running.values()]

    def lacks_room(num_steps: int) -> bool:
        taken = sum(max(0, blocks_for(n + num_steps) - blocks) for n, blocks in held)
        return taken > scheduler.pool.num_free

    if not lacks_room(most):
        return most
    return bisect_left(range(1, most), True, key=lacks_room)


def _block_events(scheduler: Scheduler, num_steps: int) -> list[_Event]:
    """Every block that is taken and every one that becomes full, in the order of the slow path.

    step       0    1      2   ...
    tokens     n   n + 1  n + 2     of which all but one have KV
    a step     takes a block if the table is too short for them, computes, publishes if full
    """
    size, publishes = scheduler.config.block_size, scheduler.config.enable_prefix_caching
    events: list[_Event] = []
    for index, request in enumerate(scheduler.running.values()):
        num_tokens = request.num_tokens
        taken = len(request.block_table) * size + 1 - num_tokens
        if taken < num_steps:
            place = scheduler._place(request)
            events += [(step, False, place, request) for step in range(taken, num_steps, size)]
        if publishes:
            full = -num_tokens % size
            events += [(step, True, index, request) for step in range(full, num_steps, size)]
    events.sort(key=itemgetter(0, 1, 2))
    return events
