"""Pins, priorities, drops and look-ups: what they promise, and that its tests have teeth."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from scheduler.mutants import Fault, plant
from scheduler.pin_faults import PIN_FAULTS
from scheduler.pin_properties import OF_PINS
from scheduler.pin_world import pin_swarm

from duetto.scheduler.free_blocks import EMPTY, FreeBlocks


@pytest.mark.parametrize("holds", OF_PINS, ids=lambda holds: holds.__name__)
def test_users_may_count_on_it(holds: Callable[[], None]) -> None:
    holds()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_the_same_answers_whatever_is_pinned_and_dropped(seed: int, depth: int) -> None:
    pin_swarm(seed, depth)


def test_the_swarms_evict_for_room_and_time_and_refuse() -> None:
    """Or they would show nothing."""
    worlds = [pin_swarm(seed, 0) for seed in range(12)]
    counts = [world.scheduler.pool.counts for world in worlds]
    assert sum(each.room for each in counts) > 100
    assert sum(each.ttl for each in counts) > 5
    assert sum(each.dropped for each in counts) > 20
    assert sum(world.num_refused for world in worlds) > 20


@pytest.mark.parametrize("fault", PIN_FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_of_pins_is_caught(fault: Fault) -> None:
    make_scheduler, _ = plant(fault)
    assert any(_raises(holds, make_scheduler) for holds in OF_PINS)


def _raises(function: Callable[..., object], make_scheduler: Any) -> bool:
    try:
        function(make_scheduler)
    except NameError:
        raise  # the planted text is at fault, and catches nothing
    except (Exception, pytest.fail.Exception):
        return True
    return False


def test_free_blocks_are_taken_by_level_and_then_by_age() -> None:
    """A list that is sorted each time is the slow twin."""
    random = Random(0)
    blocks, twin = FreeBlocks(range(20)), [(EMPTY, at, at) for at in range(20)]
    for clock in range(20, 3000):
        assert list(blocks) == [block for _, _, block in sorted(twin)]
        free = [block for _, _, block in twin]
        if random.random() < 0.45 and twin:
            twin.sort()
            level, _, block = twin.pop(0)
            assert blocks.take() == (block, level)
        elif random.random() < 0.3:
            block = random.randrange(20)
            blocks.discard(block)
            twin = [each for each in twin if each[2] != block]
        elif len(free) < 20:
            block = random.choice([b for b in range(20) if b not in free])
            level, is_next = random.choice((EMPTY, 0, 35, 100)), random.random() < 0.3
            blocks.add(block, level, is_next=is_next)
            twin.append((level, -clock if is_next else clock, block))
            assert blocks.level(block) == level and block in blocks
        assert len(blocks) == len(twin)
