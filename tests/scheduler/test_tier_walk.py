"""Tiers, pins, drops and failures together: many random steps, the same answers, nothing leaked."""

import gc
from collections.abc import Iterator

import pytest
from scheduler.tier_walk import Seen, tier_walk

NUM_SEEDS = 40
STEPS_PER_SEED = 25_000


@pytest.fixture(autouse=True)
def _no_collections() -> Iterator[None]:
    """Nothing here makes cycles, and looking for them is a quarter of the time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_short_walk_comes_to_all_that_may_happen() -> None:
    seen = tier_walk(3, 3_000)
    assert all(getattr(seen, name) > 2 for name in Seen.__slots__), seen


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_million_steps_find_nothing_wrong_and_leak_nothing(seed: int) -> None:
    """Too long for `make test`: `make oracle` walks them."""
    seen = tier_walk(1000 + seed, STEPS_PER_SEED)
    assert seen.num_steps >= STEPS_PER_SEED
