"""The oracle has teeth: every planted fault is caught, and the code without one is not accused."""

from collections.abc import Callable
from typing import Any

import pytest
from scheduler.faults import FAULTS
from scheduler.in_flight import OF_STEPS_IN_FLIGHT
from scheduler.mutants import Fault, plant
from scheduler.properties import OF_THE_POOL, OF_THE_SCHEDULER
from scheduler.refusals import REFUSALS
from scheduler.walk import walk

from duetto.scheduler.block_pool import BlockPool
from duetto.scheduler.scheduler import Scheduler

NUM_SEEDS = 24
STEPS_PER_SEED = 1000


def first_complaint(make_scheduler: Any, make_pool: Any) -> str | None:
    """What is wrong with a scheduler, or None. Bounded: every walk and property is."""
    for of_pool in OF_THE_POOL:
        if _raises(of_pool, make_pool):
            return of_pool.__name__
    for of_scheduler in (*OF_THE_SCHEDULER, *OF_STEPS_IN_FLIGHT, *REFUSALS):
        if _raises(of_scheduler, make_scheduler):
            return of_scheduler.__name__
    for seed in range(NUM_SEEDS):
        if _raises(walk, seed, STEPS_PER_SEED, make_scheduler):
            return f"walk with seed {seed}"
    return None


def _raises(function: Callable[..., object], *args: object) -> bool:
    try:
        function(*args)
    except NameError:
        raise  # the planted text is at fault, and catches nothing
    except (Exception, pytest.fail.Exception):
        return True
    return False


def test_nothing_is_said_against_the_true_scheduler() -> None:
    assert first_complaint(Scheduler, BlockPool) is None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault_is_caught(fault: Fault) -> None:
    assert first_complaint(*plant(fault)) is not None


def test_a_fault_whose_text_is_gone_is_an_error() -> None:
    with pytest.raises(AssertionError, match="stands 0 times"):
        plant(Fault("stale", "plan", "no such text", ""))
