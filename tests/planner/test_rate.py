"""The highest rate: sustained, so it is bounded by throughput and knows no length of the load."""

from dataclasses import replace

import pytest

from duetto.core.errors import ConfigError
from duetto.measure.metrics import SLO
from duetto.measure.workload import Lengths
from duetto.models.find import find_program
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout
from duetto.planner.objective import Objective
from duetto.planner.rate import THROUGHPUT, highest_rate, reached_at
from duetto.planner.search import Problem, run
from duetto.pricing.gpus import HARDWARE
from duetto.simulation.simulation import Fleet
from duetto.simulation.workload import synthetic

MOST = 1200  # requests
PROGRAM = find_program("llama-3.2-1b", 4096)
HARDWARE_ = replace(HARDWARE["a100-80g"].ideal(), num_devices=1)


def problem(num_requests: int = 60, rate: float = 20.0, **limits: float) -> Problem:
    load = synthetic(
        num_requests,
        rate,
        input_lengths=Lengths(1000, "lognormal", 0.5, 3000),
        output_lengths=Lengths(20, "lognormal", 0.5, 500),
    )
    slo = SLO(**(limits or {"ttft": 0.5}))
    return Problem(program=PROGRAM, hardware=HARDWARE_, workload=load, objective=Objective(slo))


def fleet(max_num_seqs: int = 32) -> Fleet:
    return make_fleet(PROGRAM, HARDWARE_, Layout(max_num_seqs=max_num_seqs))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter runs than for people, in the same proportion."""
    monkeypatch.setattr("duetto.planner.rate.LEAST_REQUESTS", 300)
    monkeypatch.setattr("duetto.planner.rate.MOST_REQUESTS", MOST)


def test_the_highest_rate_is_met_and_a_little_more_is_not() -> None:
    wanted = problem(ttft=0.05, itl=0.05)
    tried: list[tuple[float, bool]] = []
    rate = highest_rate(
        wanted, fleet(), tolerance=0.05, on_tried=lambda r, good: tried.append((r, good))
    )
    assert rate is not None and rate.fails_at is not None
    assert rate.fails_at / rate.requests_per_s <= 1.05
    assert (rate.requests_per_s, True) in tried and (rate.fails_at, False) in tried
    for speed, is_met in ((rate.requests_per_s, True), (rate.fails_at, False)):
        reached = reached_at(wanted, fleet(), speed)
        assert (wanted.objective.binding(reached)[1] <= 1) is is_met
    assert rate.binding in ("ttft", "itl")


@pytest.mark.parametrize("rate", [1.0, 1000.0])
def test_neither_the_length_of_a_load_nor_its_own_rate_matters(rate: float) -> None:
    """A burst that ends before its queue grows is not sustained, whatever its latencies were."""
    short, long = problem(20, rate), problem(900, rate)
    rates = [highest_rate(each, fleet(), tolerance=0.05) for each in (short, long)]
    found = [each.requests_per_s for each in rates if each is not None]
    assert len(found) == 2 and found[0] == pytest.approx(found[1], rel=0.2)
    at_once = long.workload.at([0.0] * 900)
    report = run(long, fleet(), at_once).report
    assert rates[1] is not None
    assert found[1] <= rates[1].throughput
    assert rates[1].throughput == pytest.approx(report.per_second(report.num_ok), rel=0.05)


def test_throughput_binds_where_latencies_do_not() -> None:
    """With so lax a limit a queue could grow for an hour."""
    rate = highest_rate(problem(ttft=3600.0), fleet())
    assert rate is not None and rate.fails_at is None
    assert rate.binding == THROUGHPUT and rate.requests_per_s == rate.throughput


def test_a_run_is_lengthened_to_show_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def counted(*args: object) -> object:
        lengths.append(len(args[2].arrivals))  # type: ignore[attr-defined]
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("duetto.planner.rate.run", counted)
    wanted = problem(ttft=10.0)
    reached_at(wanted, fleet(), 1.0)
    assert lengths == [300]  # 60 requests, over and over: three hundred seconds
    lengths.clear()
    reached_at(wanted, fleet(4), 1000.0)
    assert lengths[0] == 300 and lengths[-1] == MOST


def test_no_rate_is_low_enough_for_limits_that_cannot_be() -> None:
    assert highest_rate(problem(ttft=1e-6, rate=1000.0), fleet()) is None


def test_a_load_without_times_has_no_rate() -> None:
    with pytest.raises(ConfigError, match="needs a workload with times"):
        highest_rate(problem(rate=float("inf")), fleet())
