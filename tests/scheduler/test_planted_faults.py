"""The oracle has teeth: every planted fault is caught, and the code without one is not accused."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from scheduler.faults import FAULTS
from scheduler.in_flight import OF_STEPS_IN_FLIGHT
from scheduler.mutants import Fault, plant
from scheduler.properties import OF_THE_POOL, OF_THE_SCHEDULER, advances_as_step_by_step
from scheduler.refusals import REFUSALS
from scheduler.reuse_faults import REUSE
from scheduler.reuse_world import (
    brings_texts_to_their_places,
    chooses_the_same_whatever_happens,
)
from scheduler.walk import walk

from duetto.scheduler.block_pool import BlockPool
from duetto.scheduler.scheduler import Scheduler

NUM_SEEDS = 24
STEPS_PER_SEED = 1000
FIRST_SEEDS = 4  # which catch nearly all that no cheap property does
DEAR = (  # a second each
    advances_as_step_by_step,
    brings_texts_to_their_places,
    chooses_the_same_whatever_happens,
)
CHEAP = [each for each in (*OF_THE_SCHEDULER, *OF_STEPS_IN_FLIGHT, *REFUSALS) if each not in DEAR]


def first_complaint(make_scheduler: Any, make_pool: Any, *, dear_first: bool) -> str | None:
    """What is wrong with a scheduler, or None. Bounded: every walk and property is. One complaint
    is enough, so what is likely to have one is asked first: what is cheap, then walks or, with
    `dear_first`, what is dear."""
    for of_pool in OF_THE_POOL:
        if _raises(of_pool, make_pool):
            return of_pool.__name__
    return (
        _complaint_of([*CHEAP, *DEAR] if dear_first else CHEAP, make_scheduler)
        or _complaint_of_walks(range(FIRST_SEEDS), make_scheduler)
        or _complaint_of(() if dear_first else DEAR, make_scheduler)
        or _complaint_of_walks(range(FIRST_SEEDS, NUM_SEEDS), make_scheduler)
    )


def _complaint_of(properties: Sequence[Callable[[Any], None]], make_scheduler: Any) -> str | None:
    names = (each.__name__ for each in properties if _raises(each, make_scheduler))
    return next(names, None)


def _complaint_of_walks(seeds: range, make_scheduler: Any) -> str | None:
    failing = (seed for seed in seeds if _raises(walk, seed, STEPS_PER_SEED, make_scheduler))
    return next((f"walk with seed {seed}" for seed in failing), None)


def _raises(function: Callable[..., object], *args: object) -> bool:
    try:
        function(*args)
    except NameError:
        raise  # the planted text is at fault, and catches nothing
    except (Exception, pytest.fail.Exception):
        return True
    return False


def test_nothing_is_said_against_the_true_scheduler() -> None:
    """test_properties.py asks the other properties, and test_walk.py walks further with each of
    these seeds."""
    assert not any(_raises(of_pool, BlockPool) for of_pool in OF_THE_POOL)
    assert _complaint_of(CHEAP, Scheduler) is None
    assert _complaint_of_walks(range(1), Scheduler) is None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault_is_caught(fault: Fault) -> None:
    is_of_the_dear = fault in REUSE or fault.module == "fast_forward"
    assert first_complaint(*plant(fault), dear_first=is_of_the_dear) is not None


def test_a_fault_whose_text_is_gone_is_an_error() -> None:
    with pytest.raises(AssertionError, match="stands 0 times"):
        plant(Fault("stale", "plan", "no such text", ""))
