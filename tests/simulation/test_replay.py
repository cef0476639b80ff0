"""The real engine's schedule comes out of the simulator, batch by batch, if its times do."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from simulation.loads import mixed_load

from duetto.build import build, served_config
from duetto.checkpoints.shapes import SHAPES
from duetto.core.batch import ScheduledBatch
from duetto.core.config import SchedulerConfig
from duetto.core.engine_args import EngineArgs
from duetto.core.executor import Executor, Pending
from duetto.core.request import Request
from duetto.engine.engine import Engine
from duetto.models.make_model import make_model
from duetto.scheduler.scheduler import Scheduler
from duetto.simulation.executor import SimulatedExecutor, by_shape, replayed
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.simulation import Fleet, simulate
from duetto.simulation.virtual_clock import VirtualClock
from duetto.simulation.workload import Traffic

Planned = tuple[str, int, int, tuple[int, ...]]  # of a request: id, tokens before, new, blocks


@dataclass
class Recorded:
    """An executor whose batches are kept, and the instants at which the loop came round."""

    executor: Executor
    batches: list[list[Planned]] = field(default_factory=list)

    def submit(self, batch: ScheduledBatch) -> Pending:
        self.batches.append(
            [
                (r.request_id, r.num_computed_tokens, len(r.token_ids), r.block_table)
                for r in batch.requests
            ]
        )
        return self.executor.submit(batch)


@pytest.fixture(scope="module")
def load() -> Traffic:
    return mixed_load(9, num_requests=40, mean_gap_s=0.01, longest_prompt=120, longest_answer=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model(SHAPES["tiny"], folder, source=Path("tiny"), dtype="bfloat16", seed=0)
    return folder


CONFIGURATIONS = {
    "chunked": {},
    "blocks are short": {"kv_cache_memory_bytes": 1},
    "static": {"scheduling_policy": "static", "max_num_seqs": 5},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": None},
}


def real_request(load: Traffic, index: int, start: float) -> Request:
    """As the load has it, with token ids that the tiny model knows."""
    request = load.request(index)
    request.prompt_token_ids = tuple(token % 1000 for token in request.prompt_token_ids)
    request.token_ids = list(request.prompt_token_ids)
    request.arrival_time = request.timings.arrival_time = start + request.arrival_time
    request.timings.accounted_until = request.arrival_time
    return request


def run_in_real_time(engine: Engine, load: Traffic) -> tuple[list[float], float]:
    """Serve the load by the wall clock; returns when the loop came round, and when it began."""
    start, polls, arrived = time.monotonic(), [], 0
    while arrived < len(load.arrivals) or engine.has_work:
        now = time.monotonic()
        while arrived < len(load.arrivals) and load.arrivals[arrived].arrival_s <= now - start:
            engine.add(real_request(load, arrived, start))
            arrived += 1
        if engine.has_work:
            polls.append(now)
            engine.step()
    return polls, start


def replay(
    config: SchedulerConfig, load: Traffic, polls: list[float], start: float
) -> list[list[Planned]]:
    """The same load through a SimulatedExecutor, whose steps last as long as the real ones."""
    clock = VirtualClock(polls[0])
    durations: Iterator[float] = (b - a for a, b in pairwise(polls))
    executor = Recorded(SimulatedExecutor(by_shape(replayed((*durations, 0.0))), clock))
    engine = Engine(Scheduler(config), executor, clock=clock)
    arrived = 0
    for now in polls:
        assert clock() == pytest.approx(now)
        while arrived < len(load.arrivals) and load.arrivals[arrived].arrival_s <= now - start:
            engine.add(real_request(load, arrived, start))
            arrived += 1
        engine.step()
    assert not engine.has_work
    return executor.batches


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_replayed_times_give_the_real_schedule(
    model: Path, load: Traffic, changes: dict[str, object]
) -> None:
    if "kv_cache_memory_bytes" in changes:
        changes = {"kv_cache_memory_bytes": 2 * 2 * 32 * 16 * 4 * 40, "max_model_len": 256}
    values = {"max_num_batched_tokens": 64, "block_size": 8, "seed": 0, **changes}
    values["target_itl"] = "off"  # a learned price is not in the recording
    args = EngineArgs(**values)  # type: ignore[arg-type]
    built = build(model, args)
    config = served_config(built.model, args)
    real = Recorded(built.model.runner)
    polls, start = run_in_real_time(Engine(Scheduler(config), real), load)
    assert replay(config, load, polls, start) == real.batches
    # Requests came while others ran: the schedule is not that of a load that is there at once.
    seen = [{name for name, *_ in batch} for batch in real.batches]
    assert any(later - earlier for earlier, later in pairwise(seen))
    arrivals = [arrival.arrival_s for arrival in load.arrivals]
    assert sum(poll - start < arrivals[-1] for poll in polls) > 1


def test_recorded_times_through_a_whole_replica(load: Traffic) -> None:
    """`simulate` itself, step by step, with times that were recorded of it."""
    config = SchedulerConfig(
        num_blocks=60, max_model_len=256, block_size=8, max_num_batched_tokens=32
    )
    priced = simulate(
        load, Fleet(replica=ReplicaSpec(scheduler=config, step_time=lambda s: 1e-4 * s.num_tokens))
    )
    log = priced.steps[0]
    durations = [b - a for a, b in zip(log.start_time, log.end_time, strict=True)]
    spec = ReplicaSpec(scheduler=config, step_time=replayed(durations))
    again = simulate(load, Fleet(replica=spec), fast=False)
    assert list(again.steps[0].num_tokens) == list(log.num_tokens)
    assert again.steps[0].end_time.tolist() == pytest.approx(log.end_time.tolist())
