"""Loads through whole fleets: by hand, twice the same, and with nothing lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from simulation.loads import fleet, mixed_load, replica, step_time

from duetto.core.errors import ConfigError, EngineError
from duetto.core.shape import BatchShape
from duetto.routing.policies import RouterName
from duetto.simulation.perfetto import write_trace
from duetto.simulation.replica import Replica, ReplicaSpec
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import Fleet, Simulation, simulate
from duetto.simulation.virtual_clock import VirtualClock
from duetto.simulation.workload import Arrival, Traffic


def token_times(simulation: Simulation) -> list[list[float]]:
    return [s.timings.token_times for s in simulation.served]


def test_two_requests_by_hand() -> None:
    """The second arrives within the first's prompt, and is computed beside its second token."""
    seconds: list[float] = []

    def price(shape: BatchShape) -> float:
        return 0.001 * shape.num_tokens

    spec = replace(replica(max_num_batched_tokens=64), step_time=price)
    load = Traffic((Arrival(0.0, 50, 3), Arrival(0.01, 20, 2)))
    seconds += [0.050, 0.050 + 0.021, 0.071 + 0.002]
    assert token_times(simulate(load, Fleet(replica=spec))) == [
        pytest.approx(seconds),
        pytest.approx(seconds[1:]),
    ]


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    load = Traffic((Arrival(0.5, 8, 1), Arrival(100.0, 8, 1)))
    prefill = step_time(BatchShape(())) + 8 * 3e-5 + 8e-6
    run = simulate(load, fleet())
    assert token_times(run) == [[pytest.approx(0.5 + prefill)], [pytest.approx(100 + prefill)]]
    assert run.duration_s == pytest.approx(100 + prefill)


@pytest.mark.parametrize("router", ["round-robin", "least-loaded", "prefix-affinity", "predicted"])
def test_every_request_is_answered_once_whatever_the_router(router: RouterName) -> None:
    load = mixed_load(5)
    run = simulate(load, replace(fleet(3), router=router))
    assert [len(s.timings.token_times) for s in run.served] == [
        a.num_output_tokens for a in load.arrivals
    ]
    assert {s.replica for s in run.served} == {0, 1, 2}
    for served, arrival in zip(run.served, load.arrivals, strict=True):
        assert served.timings.arrival_time == arrival.arrival_s
        assert sum(served.timings.parts.values()) == pytest.approx(served.timings.e2e_s)
    computed = sum(sum(log.num_tokens) for log in run.steps)
    cached = sum(s.num_cached_tokens for s in run.served)
    wanted = sum(a.num_prompt_tokens + a.num_output_tokens - 1 for a in load.arrivals)
    assert computed == wanted - cached


def test_affinity_finds_more_in_the_cache_than_round_robin() -> None:
    """Four conversations' prompts, in turns of which round robin sends each everywhere."""
    order = (0, 1, 2, 3, 1, 2, 3, 0, 2, 3, 0, 1, 3, 0, 1, 2)
    arrivals = tuple(Arrival(0.5 * i, 300, 4, (which,)) for i, which in enumerate(order))
    load = Traffic(arrivals, hash_block=256)
    cached = {
        router: sum(
            s.num_cached_tokens for s in simulate(load, replace(fleet(4), router=router)).served
        )
        for router in ("round-robin", "prefix-affinity", "predicted")
    }
    assert cached == {"round-robin": 0, "prefix-affinity": 12 * 256, "predicted": 12 * 256}


def test_least_loaded_avoids_a_busy_replica() -> None:
    """Every second prompt is long, so round robin sends all the long ones to one replica."""
    arrivals = tuple(Arrival(0.02 * i, 400 if i % 2 else 4, 8) for i in range(40))
    load = Traffic(arrivals)
    reports = [
        sum_up(simulate(load, replace(fleet(2), router=router)), 2).report
        for router in ("round-robin", "least-loaded", "predicted")
    ]
    means = [report.ttft.mean or 0.0 for report in reports]
    assert max(means[1:]) < means[0]


def test_more_replicas_are_faster() -> None:
    load = mixed_load(6, mean_gap_s=0.001)
    durations = [simulate(load, fleet(n)).duration_s for n in (1, 2, 4)]
    assert durations == sorted(durations, reverse=True)
    assert durations[0] > 1.5 * durations[1]


def test_what_can_never_fit_is_refused_and_the_others_are_served() -> None:
    load = Traffic((Arrival(0.0, 500, 100), Arrival(0.0, 10, 2)))
    run = simulate(load, fleet())
    assert run.served[0].refusal is not None
    assert "maximum context length is 512" in run.served[0].refusal
    assert len(run.served[1].timings.token_times) == 2
    assert run.notes == ("1 of 2 requests can never fit, and are refused",)


def test_the_same_load_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        run = simulate(mixed_load(8), replace(fleet(2), router="prefix-affinity"))
        trace = tmp_path / f"{number}.json"
        write_trace(run, trace)
        report = json.dumps(sum_up(run, 2, price_per_hour=1.5).as_json())
        files.append((trace.read_bytes(), report))
    assert files[0] == files[1]


def test_a_price_that_fails_is_an_error_and_not_an_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(_shape: BatchShape) -> float:
        raise ZeroDivisionError

    with pytest.raises(EngineError, match="a simulated step failed"):
        simulate(mixed_load(1), Fleet(replica=replace(replica(), step_time=broken)))
    assert "ZeroDivisionError" in caplog.text


def test_time_does_not_go_backwards() -> None:
    clock = VirtualClock()
    clock.advance(1.5)
    clock.reach(1.0)
    assert clock() == 1.5
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="time does not go backwards"):
            clock.advance(seconds)


def test_a_replica_runs_no_step_that_starts_too_late() -> None:
    spec: ReplicaSpec = replica()
    for fast in (True, False):
        one = Replica(spec, on_end=lambda _update: None, fast=fast)
        one.offer(Traffic((Arrival(0.0, 8, 200),)).request(0), 0.0)
        one.run_until(0.1)
        assert one.steps.start_time[-1] < 0.1 <= one.steps.end_time[-1]


def test_a_fleet_has_replicas() -> None:
    with pytest.raises(ConfigError, match="--replicas 0"):
        fleet(0)
