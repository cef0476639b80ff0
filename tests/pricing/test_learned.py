"""The price that is learned from steps: right soon, never less for more, the same again."""

import random
from collections.abc import Callable, Iterator

import pytest

from duetto.core.shape import EMPTY, BatchShape, RequestShape
from duetto.pricing.learned import LearnedStepTime
from duetto.pricing.reuse import LookShare

PRICES = (2e-3, 3e-4, 5e-4, 1e-8, 2e-7)  # per step, token, logit row, pair, KV token


def true_time(shape: BatchShape) -> float:
    pairs = sum(r.attended_pairs(None) for r in shape.requests)
    read = sum(r.read_tokens(None) for r in shape.requests)
    amounts = (1, shape.num_tokens, shape.num_logit_rows, pairs, read)
    return sum(price * amount for price, amount in zip(PRICES, amounts, strict=True))


def streams(count: int, num_past: int) -> tuple[RequestShape, ...]:
    return (RequestShape(1, num_past),) * count


def steps(
    num_steps: int, seed: int = 0, spread: float = 0.08
) -> Iterator[tuple[BatchShape, float]]:
    """Streams, beside a chunk now and then, on a machine that is not quite steady."""
    rng = random.Random(seed)
    for _ in range(num_steps):
        requests = streams(rng.choice([1, 4, 8]), rng.randint(50, 1500))
        if rng.random() < 0.3:
            requests += (RequestShape(rng.randint(5, 400), rng.choice([0, 300, 900]), 0),)
        shape = BatchShape(requests)
        yield shape, true_time(shape) * rng.lognormvariate(0, spread)


def errors(model: LearnedStepTime, **how: float) -> list[float]:
    found = []
    for shape, seconds in steps(300, **how):  # type: ignore[arg-type]
        found.append(abs(model.step_time(shape) / true_time(shape) - 1))
        model.observe(shape, seconds)
    return found


@pytest.mark.parametrize(
    "start",
    [None, lambda shape: 0.1 * true_time(shape), lambda shape: 1e-6 + 1e-4 * shape.num_tokens],
    ids=["nothing", "right but for the scale", "wrong in every way"],
)
def test_it_is_right_soon_whatever_it_started_from(
    start: Callable[[BatchShape], float] | None,
) -> None:
    found = errors(LearnedStepTime(start))
    assert max(found[100:]) < 0.12 and sum(found[100:]) / 200 < 0.03
    assert sum(found[20:60]) / 40 < 0.12


def test_one_step_corrects_the_scale_of_what_was_never_measured() -> None:
    model = LearnedStepTime(lambda shape: true_time(shape) / 50)
    for shape, seconds in [(BatchShape(streams(8, 300)),) * 2] * 3:
        model.observe(shape, true_time(seconds))
    chunk = BatchShape((*streams(8, 300), RequestShape(200, 0, 0)))
    assert model.step_time(chunk) == pytest.approx(true_time(chunk), rel=0.3)


def test_what_was_never_measured_does_not_bend_what_was() -> None:
    """The start is right about the steps that come, and too low about all others."""

    def start(shape: BatchShape) -> float:
        return true_time(shape) * (1.0 if 8 <= shape.num_tokens < 32 else 0.6)

    model, found = LearnedStepTime(start), []
    rng = random.Random(5)
    for index in range(120):
        chunk = RequestShape(8, 9 * index, 0)
        shape = BatchShape((*streams(8, 1200 + index), chunk))
        found.append(model.step_time(shape) / true_time(shape))
        model.observe(shape, true_time(shape) * rng.lognormvariate(0, 0.04))
    assert sum(found[60:]) / 60 == pytest.approx(1, abs=0.03)


def test_looks_at_deviations_are_told_from_chunks() -> None:
    """They take a tenth, and neither spoil the price of the other."""

    def cost(shape: BatchShape) -> float:
        looks = [r for r in shape.requests if r.is_short]
        others = BatchShape(tuple([r for r in shape.requests if not r.is_short]))
        pairs = sum(r.attended_pairs(None) for r in looks)
        read = sum(r.read_tokens(None) for r in looks)
        amounts = (0, 0.1 * sum(r.num_new for r in looks), 0, 0.25 * pairs, 0.25 * read)
        look_s = sum(price * amount for price, amount in zip(PRICES, amounts, strict=True))
        return true_time(others) + look_s

    model = LearnedStepTime(cost, LookShare(0.1, 0.25))
    rng = random.Random(1)
    for number in range(200):
        own = RequestShape(rng.randint(100, 400), rng.choice([0, 300]), 0, number % 2 == 0)
        shape = BatchShape((*streams(rng.choice([0, 4]), 700), own))
        model.observe(shape, cost(shape) * rng.lognormvariate(0, 0.04))
    for is_short in (False, True):
        shape = BatchShape((RequestShape(300, 200, 0, is_short),))
        assert model.step_time(shape) == pytest.approx(cost(shape), rel=0.1)
        assert model.has_measured(shape)
        beside = BatchShape((*streams(4, 700), RequestShape(300, 200, 0, is_short)))
        assert model.step_time(beside) == pytest.approx(cost(beside), rel=0.1)


def test_thousands_of_next_tokens_do_not_make_it_forget_chunks() -> None:
    model = LearnedStepTime()
    errors(model)
    for index in range(3000):
        shape = BatchShape(streams(8, 300 + index // 4))
        model.observe(shape, true_time(shape))
    chunk = BatchShape((*streams(8, 1000), RequestShape(200, 300, 0)))
    assert model.step_time(chunk) == pytest.approx(true_time(chunk), rel=0.1)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    model = LearnedStepTime()
    errors(model)
    for shape, seconds in steps(900, seed=1):
        model.observe(shape, 2 * seconds)
    for shape, _ in steps(50, seed=2):
        assert model.step_time(shape) == pytest.approx(2 * true_time(shape), rel=0.15)


def test_a_step_in_which_the_machine_slept_counts_little() -> None:
    model = LearnedStepTime()
    errors(model)
    shape = BatchShape(streams(4, 500))
    before = model.step_time(shape)
    model.observe(shape, 1000 * before)
    assert model.step_time(shape) < 1.3 * before


def test_more_work_never_takes_less_time() -> None:
    model = LearnedStepTime(lambda shape: 1e-4 * shape.num_tokens)
    rng = random.Random(3)
    for _ in range(200):
        shape = BatchShape(streams(rng.randint(1, 8), rng.randint(1, 900)))
        model.observe(shape, rng.uniform(1e-4, 1e-1))  # pure noise
        assert all(price >= 0 for price in model.prices)
        times = [
            model.step_time(BatchShape((*shape.requests, RequestShape(n, 100, 0))))
            for n in range(1, 200, 20)
        ]
        assert times == sorted(times)


def test_equal_measurements_give_equal_prices() -> None:
    models = [LearnedStepTime(true_time), LearnedStepTime(true_time)]
    for model in models:
        errors(model)
    assert models[0].prices == models[1].prices


def test_what_says_nothing_is_not_learned_from() -> None:
    model = LearnedStepTime(true_time)
    before = model.prices
    model.observe(EMPTY, 1.0)
    model.observe(BatchShape(streams(1, 1)), 0.0)
    model.observe(BatchShape(streams(1, 1)), float("nan"))
    assert model.prices == before and model.num_observed == 0


def test_it_says_of_which_sizes_steps_were_measured() -> None:
    model = LearnedStepTime(true_time)
    assert not model.has_measured(BatchShape(streams(4, 100)))  # it was only begun from a guess
    model.observe(BatchShape(streams(4, 100)), 1e-3)
    assert model.has_measured(BatchShape(streams(5, 1000)))
    assert not model.has_measured(BatchShape(streams(64, 100)))


def test_of_many_steps_alike_in_a_row_few_are_learned_from() -> None:
    model = LearnedStepTime()
    alike = BatchShape(streams(4, 100))
    for _ in range(1000):
        model.observe(alike, 1e-3)
    few = model.num_observed
    assert 64 < few < 250
    assert model.step_time(alike) == pytest.approx(1e-3, rel=0.01)
    model.observe(BatchShape(streams(5, 100)), 1e-3)  # another size, at once
    assert model.num_observed == few + 1


def test_all_but_one_in_twenty_steps_with_prompts_end_by_the_late_time() -> None:
    model, late = LearnedStepTime(true_time), []
    for shape, seconds in steps(4000, spread=0.05):
        if shape.num_tokens > len(shape.requests):
            late.append(seconds > model.late_time(shape))
        model.observe(shape, seconds)
    assert 0.03 < sum(late[400:]) / len(late[400:]) < 0.08


def test_where_steps_take_what_they_should_none_is_thought_late() -> None:
    model = LearnedStepTime(true_time)
    for shape, _ in steps(300):
        model.observe(shape, true_time(shape))
        assert model.step_time(shape) <= model.late_time(shape) < 1.03 * model.step_time(shape)
