"""KV that leaves the arena and comes back: the same answers, and every planted fault is caught."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scheduler.mutants import Fault, plant_in_copies
from scheduler.tier_faults import TIERS
from scheduler.tier_properties import PROPERTIES
from scheduler.tier_world import swarm

from duetto.runner.tiers import mover


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda each: each.__name__)
def test_it_holds_that(holds: Callable[..., None]) -> None:
    holds()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_the_same_answers_whatever_goes_on(seed: int, depth: int) -> None:
    swarm(seed, depth)


def test_the_swarms_load_read_and_fail() -> None:
    """Or they would show nothing."""
    counts = [world.tiers.counts for seed in range(12) for world in swarm(seed)]
    assert sum(each.num_loaded for each in counts) > 100
    assert sum(each.num_read for each in counts) > 50
    assert sum(each.num_failed for each in counts) > 20
    assert sum(each.num_declined for each in counts) > 0
    assert sum(each.num_written for each in counts) > 100


def makers_of(fault: Fault) -> dict[str, Any]:
    if fault.module != "mover":
        copies = plant_in_copies(fault)
        return {
            "make_scheduler": copies["scheduler"].Scheduler,
            "make_tiers": copies["tiers"].Tiers,
        }
    text = Path(mover.__file__).read_text()
    assert text.count(fault.old) == 1, f"{fault.name}: its text does not stand once in mover.py"
    module = ModuleType("planted")
    exec(compile(text.replace(fault.old, fault.new), "<planted>/mover.py", "exec"), module.__dict__)
    return {"make_mover": module.Mover}


def first_complaint(makers: dict[str, Any]) -> str | None:
    for holds in PROPERTIES:
        if _raises(holds, **makers):
            return holds.__name__
    for seed in range(24):
        if _raises(swarm, seed, seed % 3, **makers):
            return f"swarm {seed}"
    return None


def _raises(function: Callable[..., object], *args: object, **makers: Any) -> bool:
    try:
        function(*args, **makers)
    except NameError:
        raise  # the planted text is at fault, and catches nothing
    except Exception:
        return True
    return False


@pytest.mark.parametrize("fault", TIERS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_in_the_tiers_is_caught(fault: Fault) -> None:
    assert first_complaint(makers_of(fault)) is not None
