"""Many steps of next tokens at once: what `Scheduler.advance` needs to know. Changes nothing.

Where every running request needs one token and nobody can be admitted, what the next steps will do
is known without planning them. Knows no executor and no clock: the caller brings the instants at
which the steps end. Equality with step after step, field by field, is the test.
"""

from bisect import bisect_left
from collections.abc import Collection
from operator import itemgetter
from typing import NamedTuple

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request


class BlockEvent(NamedTuple):
    """A block is taken, or becomes full."""

    step: int
    is_full: bool
    order: object  # within the step
    request: Request


def is_streaming(request: Request) -> bool:
    """Whether all that it needs is its next token, which has a predecessor."""
    if request.num_in_flight:
        return False
    return request.num_uncomputed_tokens == 1 and request.num_output_tokens > 0


def num_steps_in_block(request: Request, config: SchedulerConfig) -> int:
    """Before it takes a block, or has one full."""
    size, num_tokens = config.block_size, request.num_tokens
    return min(len(request.block_table) * size + 1 - num_tokens, -num_tokens % size)


def num_steps_with_room(
    requests: Collection[Request], num_free: int, most: int, config: SchedulerConfig
) -> int:
    """The largest number of steps, up to `most`, for which there are free blocks."""
    held = [(r.num_tokens - 1, len(r.block_table)) for r in requests]

    def lacks_room(num_steps: int) -> bool:
        taken = sum(max(0, config.num_blocks_for(n + num_steps) - blocks) for n, blocks in held)
        return taken > num_free

    if not lacks_room(most):
        return most
    return bisect_left(range(1, most), True, key=lacks_room)


def block_events(
    placed: Collection[tuple[object, Request]], num_steps: int, config: SchedulerConfig
) -> list[BlockEvent]:
    """Every block that is taken and every one that becomes full, in the order of the slow path.
    `placed` are the running requests, each with its place in the order of requests.

    step       0    1      2   ...
    tokens     n   n + 1  n + 2     of which all but one have KV
    a step     takes a block if the table is too short for them, computes, publishes if full
    """
    size, publishes = config.block_size, config.enable_prefix_caching
    events: list[BlockEvent] = []
    for index, (place, request) in enumerate(placed):
        num_tokens = request.num_tokens
        taken = len(request.block_table) * size + 1 - num_tokens
        for step in range(taken, num_steps, size):
            events.append(BlockEvent(step, False, place, request))
        if publishes:
            full = -num_tokens % size
            events += [
                BlockEvent(step, True, index, request) for step in range(full, num_steps, size)
            ]
    events.sort(key=itemgetter(0, 1, 2))
    return events


def let_have(request: Request, num_computed: int, token_id: int) -> None:
    """Let a request have `num_computed` tokens computed, and the next one sampled."""
    request.token_ids += [token_id] * (num_computed + 1 - request.num_tokens)
    request.num_computed_tokens = request.num_written_tokens = num_computed
