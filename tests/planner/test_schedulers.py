"""Ways to schedule one load: engines' options, and fleets that are the same."""

from dataclasses import replace

import pytest

from duetto.core.config import scheduler_config
from duetto.core.engine_args import EngineArgs
from duetto.core.shape import BatchShape
from duetto.measure.workload import Workload, WorkloadRequest
from duetto.planner.schedulers import (
    APART,
    CHUNKED,
    CONTINUOUS,
    KINDS,
    REPLICAS,
    STATIC,
    PricedEngine,
    SchedulerKind,
    engine_args_of,
    fleet_of,
    traffic_of,
)
from duetto.simulation.disaggregation import KVLink
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import simulate

ARGS = EngineArgs(max_num_batched_tokens=64, target_itl="off")
LINK = KVLink(num_layers=4, bytes_per_token=1024, bytes_per_s=1e9)
LOAD = Workload(
    tuple(
        WorkloadRequest(
            num_output_tokens=40 if i % 4 else 4,
            prompt_token_ids=(i,) * (30 if i % 4 else 700),
            arrival_s=0.02 * i,
        )
        for i in range(40)
    )
)


def step_time(shape: BatchShape) -> float:
    """A millisecond for a step and a tenth for each token."""
    return 0.001 + 0.0001 * shape.num_tokens


def largest_gap(kind: SchedulerKind) -> float:
    config = scheduler_config(engine_args_of(kind, ARGS), num_blocks=400, max_model_len=1024)
    fleet = fleet_of(kind, PricedEngine(config, step_time), LINK)
    report = sum_up(simulate(traffic_of(LOAD), fleet), fleet.num_devices).report
    assert report.num_ok == len(LOAD.requests)
    assert report.itl.max is not None
    return report.itl.max


def test_what_each_is() -> None:
    args = {kind: engine_args_of(kind, ARGS) for kind in KINDS}
    assert args[STATIC].scheduling_policy == "static"
    assert not args[STATIC].enable_chunked_prefill and not args[CONTINUOUS].enable_chunked_prefill
    assert args[CHUNKED] == args[REPLICAS] == args[APART] == ARGS
    engine = PricedEngine(scheduler_config(ARGS, num_blocks=9, max_model_len=64), step_time)
    fleets = {kind: fleet_of(kind, engine, LINK) for kind in KINDS}
    assert [fleets[kind].num_devices for kind in KINDS] == [1, 1, 1, 2, 2]
    assert fleets[APART].disaggregation is not None


def test_whole_prompts_hold_up_streams_chunks_less_and_another_engine_not_at_all() -> None:
    whole, chunked, apart = (largest_gap(kind) for kind in (CONTINUOUS, CHUNKED, APART))
    assert whole > 0.07  # a prompt of 700 tokens in one step
    assert chunked < 0.01 and apart < chunked
    assert largest_gap(STATIC) <= whole  # nobody joins a batch that runs


def test_the_load_is_the_same() -> None:
    late = replace(LOAD, requests=tuple(reversed(LOAD.requests)))
    for workload in (LOAD, late):
        arrivals = traffic_of(workload).arrivals
        assert [a.num_prompt_tokens for a in arrivals[:5]] == [700, 30, 30, 30, 700]
        assert arrivals[-1].arrival_s == pytest.approx(0.78)
