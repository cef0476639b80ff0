"""Policies: who goes first, and who may be admitted. Pure functions; no state, no clock.

A policy is three functions. `order` gives a request's place as a key that never changes while it
lives, so queues stay sorted without re-sorting. `choose` says which waiting requests may be
admitted, given whom it chose in the step before: their ids, or None for anyone. `level` says among
which requests clients take turns (fairness.py); without it they do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duetto.core.config import SchedulerConfig
from duetto.core.options import SchedulingPolicy
from duetto.core.request import Request
from duetto.scheduler.fairness import Level

Order = Callable[[Request, SchedulerConfig], float]
Chosen = frozenset[str] | None
Choose = Callable[[Chosen, Sequence[Request], int, int], Chosen]


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


def anyone(
    _chosen: Chosen, _waiting: Sequence[Request], _num_running: int, _max_num_seqs: int
) -> Chosen:
    """Continuous batching (Orca, Yu et al., OSDI 2022): a place that is free is free to all."""
    return None


def batch_by_batch(
    chosen: Chosen, waiting: Sequence[Request], num_running: int, max_num_seqs: int
) -> Chosen:
    """Static batching: a batch is chosen when nothing runs, and runs until its longest ends.

    A budget can spread the admission of one batch over several steps, and a preempted member may
    come back; nobody else joins.
    """
    if num_running:
        return chosen
    return frozenset(request.request_id for request in waiting[:max_num_seqs])


@dataclass(frozen=True, slots=True)
class Policy:
    order: Order
    choose: Choose
    level: Level | None


def one_level(_request: Request) -> int:
    return 0


def level_of_priority(request: Request) -> int:
    """Ageing moves a request within the order; turns are taken among those of one priority."""
    return request.priority


POLICIES: dict[SchedulingPolicy, Policy] = {
    "fcfs": Policy(by_arrival, anyone, one_level),
    "priority": Policy(by_priority, anyone, level_of_priority),
    "static": Policy(by_arrival, batch_by_batch, None),
}
