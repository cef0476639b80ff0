"""Arrival processes: their means, their burstiness, and a trace's own times."""

import math

import numpy as np
import pytest

from duetto.core.errors import ConfigError
from duetto.measure.arrivals import ArrivalOptions, at_rate, at_trace_times
from duetto.measure.workload import Workload, WorkloadRequest


def workload(times: list[float]) -> Workload:
    return Workload(
        tuple(
            WorkloadRequest(prompt_token_ids=(i,), num_output_tokens=1, arrival_s=time)
            for i, time in enumerate(times)
        )
    )


def arrivals(made: Workload) -> list[float]:
    return [request.arrival_s for request in made.requests]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_with_the_asked_rate(burstiness: float) -> None:
    times = arrivals(at_rate(workload([0.0] * 20_000), 5.0, burstiness=burstiness, seed=3))
    assert times[-1] == pytest.approx(20_000 / 5.0)
    gaps = np.diff([0.0, *times])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2)
    # A gamma distribution's coefficient of variation is 1 / sqrt(shape).
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_burstiness_one_is_a_poisson_process() -> None:
    times = np.array(arrivals(at_rate(workload([0.0] * 20_000), 50.0, seed=4)))
    per_second = np.bincount(times.astype(int))[:-1]
    # Counts in windows of one second have the variance of their mean.
    assert per_second.var() / per_second.mean() == pytest.approx(1.0, abs=0.15)
    gaps = np.diff(times)
    assert (gaps > 2 / 50).mean() == pytest.approx(math.exp(-2), abs=0.01)


def test_a_seed_fixes_the_times() -> None:
    made = workload([0.0] * 10)
    assert arrivals(at_rate(made, 1.0, seed=1)) == arrivals(at_rate(made, 1.0, seed=1))
    assert arrivals(at_rate(made, 1.0, seed=1)) != arrivals(at_rate(made, 1.0, seed=2))


def test_an_infinite_rate_is_all_at_once() -> None:
    assert arrivals(at_rate(workload([1.0, 2.0]), math.inf)) == [0.0, 0.0]


def test_a_trace_is_replayed_from_its_first_request() -> None:
    assert arrivals(at_trace_times(workload([7.0, 9.0, 8.0]), speed=4.0)) == [0.0, 0.5, 0.25]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ConfigError, match="--request-rate"):
        at_rate(workload([0.0]), rate)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_burstiness_and_speed(bad: float) -> None:
    with pytest.raises(ConfigError, match="--burstiness"):
        at_rate(workload([0.0]), 1.0, burstiness=bad)
    with pytest.raises(ConfigError, match="--trace-speed"):
        at_trace_times(workload([0.0]), speed=bad)


def test_options_choose_the_process() -> None:
    made = workload([5.0, 6.0])
    at_two = ArrivalOptions(request_rate=2.0).apply(made, has_times=False, seed=1)
    assert arrivals(at_two) == arrivals(at_rate(made, 2.0, seed=1))
    replayed = ArrivalOptions(request_rate="trace", trace_speed=2.0)
    assert arrivals(replayed.apply(made, has_times=True, seed=1)) == [0.0, 0.5]
    with pytest.raises(ConfigError, match="no times"):
        replayed.apply(made, has_times=False, seed=1)


def test_a_loop_is_closed_by_a_limit_without_a_rate() -> None:
    assert ArrivalOptions(max_concurrency=3).is_closed_loop
    assert not ArrivalOptions(max_concurrency=3, request_rate=9.0).is_closed_loop
    assert not ArrivalOptions().is_closed_loop
    assert ArrivalOptions().as_json()["request_rate"] == "inf"
