"""What steps of a few rows take: exactly where measured, never less for more."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duetto.core.shape import BatchShape, RequestShape
from duetto.pricing.learned import LearnedStepTime
from duetto.pricing.row_steps import RowSteps

CLIFF = {1: 1.0, 2: 1.1, 3: 2.0, 4: 2.0, 5: 2.1, 8: 3.0}


def told(times: dict[int, float], how_often: int = 30, spread: float = 0.0) -> RowSteps:
    steps, rng = RowSteps(), random.Random(1)
    for _ in range(how_often):
        for size, seconds in times.items():
            steps.observe(size, 0, 0, seconds * rng.lognormvariate(0, spread), 0.1)
    return steps


def test_each_size_takes_what_its_steps_took() -> None:
    steps = told(CLIFF, spread=0.05)
    for size, seconds in CLIFF.items():
        assert steps.seconds(size, 0.1) == pytest.approx(seconds, rel=0.05)


def test_between_sizes_it_is_interpolated_and_beyond_them_a_line() -> None:
    steps = told(CLIFF)
    assert steps.seconds(6, 0.1) == pytest.approx(2.1 + 0.9 / 3, rel=0.02)
    assert steps.seconds(10, 0.1) == pytest.approx(3.2, rel=0.02)


def test_context_is_priced_apart_whenever_its_price_is_known() -> None:
    steps = RowSteps()
    for _ in range(30):
        steps.observe(1, 0, 100, 2.0, 0.0)
        steps.observe(2, 0, 200, 4.0, 0.0)
    steps.price_context(0.0, 0.01)
    assert steps.many(1, 3, 0.0) == pytest.approx([1.0, 2.0], rel=0.02)


def test_rare_sizes_follow_a_machine_that_becomes_slower() -> None:
    steps = told(CLIFF)
    for _ in range(300):
        steps.observe(1, 0, 0, 2.0, 0.1)
    assert steps.seconds(1, 0.1) == pytest.approx(2.0, rel=0.05)
    assert steps.seconds(3, 0.1) > 2.4  # not the 2.0 of before: half of the way at least


def test_a_wrong_guess_is_mended_by_two_steps() -> None:
    steps = RowSteps()
    for _ in range(30):
        steps.observe(1, 0, 0, 1.0, 0.0)  # the line says that a second row costs nothing
    for _ in range(2):
        steps.observe(2, 0, 0, 2.0, 0.0)
    assert steps.seconds(2, 0.0) > 1.7


def test_there_is_hope_for_a_size_until_it_is_measured() -> None:
    steps = told({1: 1.0})
    assert steps.many(1, 4, 0.5) == pytest.approx([1.0, 1.5, 2.0])
    hopes = steps.hopeful(1, 4, 0.5)
    assert hopes[0] == pytest.approx(1.0) and hopes[1] < 1.1 and hopes[2] < 1.5
    for _ in range(20):
        steps.observe(2, 0, 0, 1.5, 0.5)
    assert steps.hopeful(2, 3, 0.5)[0] > 1.4


measured = st.lists(st.tuples(st.integers(1, 40), st.floats(1e-4, 1e-1)), min_size=1, max_size=60)


@given(measured, st.floats(0, 1e-2))
def test_more_rows_never_take_less(steps: list[tuple[int, float]], row_s: float) -> None:
    rows = RowSteps()
    for size, seconds in steps:
        rows.observe(size, 0, 0, seconds, row_s)
    times = rows.many(1, 60, row_s)
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times))
    assert times == pytest.approx([rows.seconds(n, row_s) for n in range(1, 60)])
    hopes = rows.hopeful(1, 60, row_s)
    assert all(h <= t * (1 + 1e-9) for h, t in zip(hopes, times, strict=True))


def test_the_price_of_drafts_is_the_price_of_the_step_with_them() -> None:
    """The quick way gives what the slow one gives: a step with n more rows, one by one."""
    model, rng = LearnedStepTime(), random.Random(2)
    for _ in range(400):
        size = rng.choice([1, 2, 3, 5, 9])
        shape = BatchShape((RequestShape(size, rng.randint(50, 500), size),))
        model.observe(shape, 1e-2 + 1e-3 * (size > 2) + 1e-6 * shape.requests[0].num_past)
    start = BatchShape((RequestShape(1, 200),))
    quick = model.row_times(start, 8)
    slow = [model.step_time(BatchShape((RequestShape(1 + n, 200, 1 + n),))) for n in range(9)]
    assert quick == pytest.approx(slow, rel=0.02)
    assert quick == sorted(quick) and quick[2] - quick[1] > 0.5e-3


def test_a_step_beside_a_chunk_takes_no_less_than_its_streams() -> None:
    model = LearnedStepTime(lambda shape: 1e-4 * shape.num_tokens)
    streams = (RequestShape(1, 100),) * 8
    for _ in range(100):
        model.observe(BatchShape(streams), 5e-2)
    chunk = BatchShape((*streams, RequestShape(1, 100, 0)))
    assert model.step_time(chunk) >= model.step_time(BatchShape(streams)) == pytest.approx(5e-2)
    with_drafts = model.row_times(chunk, 3)
    assert with_drafts[0] == pytest.approx(model.step_time(chunk))
    assert with_drafts == sorted(with_drafts)


def test_a_slow_phase_is_not_taken_for_the_price_of_the_size_that_runs_in_it() -> None:
    steps, rng = told({1: 1.0, 2: 1.2, 5: 1.6}, spread=0.05), random.Random(3)
    for _ in range(60):
        steps.observe(5, 0, 0, 1.5 * 1.6 * rng.lognormvariate(0, 0.05), 0.1)
    steps.observe(3, 0, 0, 1.5 * 1.4, 0.1)  # never seen before
    assert steps.seconds(5, 0.1) == pytest.approx(1.5 * 1.6, rel=0.1)
    for size, seconds in {1: 1.0, 2: 1.2, 3: 1.4}.items():
        assert steps.seconds(size, 0.1) / steps.seconds(5, 0.1) == pytest.approx(
            seconds / 1.6, rel=0.1
        )


def test_steps_that_tell_nothing_new_tell_of_the_level() -> None:
    steps = told({1: 1.0, 2: 1.2})
    before = steps.many(1, 3, 0.1)
    steps.observe(1, 0, 0, 1.0, 0.1)
    for _ in range(40):
        steps.follow(1.4)
    assert steps.many(1, 3, 0.1) == pytest.approx([1.4 * each for each in before], rel=0.02)


def test_there_is_no_hope_for_a_size_between_two_near_ones() -> None:
    steps = told({20: 2.0, 22: 2.2, 40: 4.0})
    thought, hopes = steps.many(20, 41, 0.1), steps.hopeful(20, 41, 0.1)
    assert hopes[1] == pytest.approx(thought[1])
    assert hopes[10] < 0.9 * thought[10]


def test_a_full_tile_may_take_less_than_one_with_a_rest() -> None:
    steps = told({1: 1.0, 4: 1.8})
    hopes = steps.hopeful(1, 8, 0.1)
    assert hopes[0] <= min(hopes) and hopes[4] < steps.seconds(4, 0.1)
