"""A million random steps, and no block leaked, no request lost, no token wrong."""

import gc
from collections.abc import Iterator

import pytest
from scheduler.walk import walk

NUM_SEEDS = 40  # many, so that they spread over processors
STEPS_PER_SEED = 2_500
LONG = 10 * STEPS_PER_SEED


@pytest.fixture(autouse=True)
def _no_collections() -> Iterator[None]:
    """Nothing here makes cycles, and looking for them is a quarter of the time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_random_walk_finds_nothing_wrong(seed: int) -> None:
    """A tenth of the million, and four times what catches every planted fault."""
    assert walk(seed, STEPS_PER_SEED) >= STEPS_PER_SEED


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_million_steps_find_nothing_wrong(seed: int) -> None:
    assert walk(seed, LONG) >= LONG


def test_a_walk_is_the_same_every_time() -> None:
    assert walk(seed=1, num_steps=500) == walk(seed=1, num_steps=500)
