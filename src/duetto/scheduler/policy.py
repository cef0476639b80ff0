"""Policies: who goes first, and how many may be admitted. Pure functions; no state, no clock.

A policy is two functions and a flag. `order` gives a request's place as a key that never changes
while it lives, so queues stay sorted without re-sorting. `num_admissible` says how many waiting
requests may join in this step; `is_closed`, whether these are the first in the queue and no others.
"""

from collections.abc import Callable
from dataclasses import dataclass

from duetto.core.config import SchedulerConfig, SchedulingPolicy
from duetto.core.request import Request

Order = Callable[[Request, SchedulerConfig], float]
NumAdmissible = Callable[[int, int, int, int], int]


def by_arrival(request: Request, config: SchedulerConfig) -> float:
    """First come, first served: ties are left to the order of arrival."""
    return 0.0


def by_priority(request: Request, config: SchedulerConfig) -> float:
    """Lower priority first, with ageing: `ageing_s` of waiting is worth one level.

    Ageing by the clock would be priority - (now - arrival) / ageing_s. Between two requests `now`
    cancels, so this constant orders them alike at every instant. No one starves: only finitely
    many arrivals can ever come before a given key.
    """
    return request.priority + request.arrival_time / config.ageing_s


def continuously(left: int, num_running: int, num_waiting: int, max_num_seqs: int) -> int:
    """Continuous batching (Orca, Yu et al., OSDI 2022): any free place is filled at once."""
    return max_num_seqs - num_running


def batch_by_batch(left: int, num_running: int, num_waiting: int, max_num_seqs: int) -> int:
    """Static batching: a batch is chosen when nothing runs, and runs until its longest ends.

    `left` is how many of the chosen batch are still to be admitted, and these are the first in the
    queue: a budget can spread the admission of one batch over several steps, and a preempted member
    may come back.
    """
    return left if num_running else min(num_waiting, max_num_seqs)


@dataclass(frozen=True, slots=True)
class Policy:
    order: Order
    num_admissible: NumAdmissible
    is_closed: bool = False


POLICIES: dict[SchedulingPolicy, Policy] = {
    "fcfs": Policy(by_arrival, continuously),
    "priority": Policy(by_priority, continuously),
    "static": Policy(by_arrival, batch_by_batch, is_closed=True),
}
