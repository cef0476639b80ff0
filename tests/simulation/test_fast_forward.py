"""A run of next tokens at once is, field by field, what its steps are one at a time."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from simulation.loads import fleet, mixed_load, replica, scheduler_config, step_time

from duetto.scheduler.scheduler import Scheduler
from duetto.simulation.executor import step_by_step, token_of
from duetto.simulation.replica import Replica
from duetto.simulation.simulation import Simulation, simulate
from duetto.simulation.workload import Arrival, Traffic

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "room for all": {},
    "blocks are short": {"num_blocks": 64},
    "protected early": {"num_blocks": 40, "max_model_len": 300, "max_preemptions": 1},
    "few places": {"max_num_seqs": 3},
    "a small budget": {"max_num_batched_tokens": 5},
    "static": {"scheduling_policy": "static", "max_num_seqs": 6},
    "priority": {"scheduling_policy": "priority", "num_blocks": 64},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
    "whole prompts, blocks are short": {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 512,
        "num_blocks": 64,
    },
    "no prefix cache": {"enable_prefix_caching": False, "num_blocks": 64},
    "blocks of one token": {"block_size": 1, "num_blocks": 500},
    "a target": {"target_itl_s": 0.006, "num_blocks": 80},
}


def everything(simulation: Simulation) -> list[object]:
    """All numbers of a simulation, exactly."""
    served = [asdict(s) for s in simulation.served]
    return [*served, *(asdict(log) for log in simulation.steps)]


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("mean_gap_s", [0.02, 0.4])
def test_fast_and_slow_agree_in_every_number(changes: dict[str, Any], mean_gap_s: float) -> None:
    for seed in range(4):
        load = mixed_load(seed, mean_gap_s=mean_gap_s, num_requests=40)
        fast, slow = (simulate(load, fleet(**changes), fast=fast) for fast in (True, False))
        assert everything(fast) == everything(slow)


def schedulers_agree(one: Scheduler, other: Scheduler) -> None:
    one.check()
    for field in ("_ref_counts", "_block_of", "_hash_of", "_evicted", "_num_evicted"):
        assert getattr(one.pool, field) == getattr(other.pool, field), field
    assert list(one.pool._free) == list(other.pool._free)  # a dict's equality ignores its order
    assert list(one.running) == list(other.running)
    for a, b in zip(one.running.values(), other.running.values(), strict=True):
        assert a.token_ids == b.token_ids
        assert a.block_table == b.block_table
        assert a.block_hashes == b.block_hashes
        assert a.num_computed_tokens == b.num_computed_tokens
        assert a.num_written_tokens == b.num_written_tokens
        assert a.num_published_blocks == b.num_published_blocks
        assert a.timings == b.timings
    assert [r.request_id for r in one.waiting] == [r.request_id for r in other.waiting]
    ours, theirs = one._publisher._misses, other._publisher._misses
    assert ours._next_of == theirs._next_of


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_schedulers_are_in_the_same_state_at_every_arrival(changes: dict[str, Any]) -> None:
    load = mixed_load(7)
    fast, slow = (
        Replica(replica(**changes), on_end=lambda _update: None, fast=fast)
        for fast in (True, False)
    )
    for index, arrival in enumerate(load.arrivals):
        for each in (fast, slow):
            each.offer(load.request(index), arrival.arrival_s)
        schedulers_agree(fast._scheduler, slow._scheduler)


def streaming(num_blocks: int) -> Scheduler:
    """Four requests of 7 prompt tokens, one of 10 tokens of answer, that have one token each."""
    arrivals = tuple(Arrival(0.0, 7, num_output) for num_output in (60, 60, 10, 60))
    load = Traffic(arrivals)
    one = Replica(replica(num_blocks=num_blocks), on_end=lambda _update: None)
    for index in range(len(arrivals)):
        one._engine.add(load.request(index))
    one._engine.step()
    return one._scheduler


def test_a_run_ends_before_a_request_does() -> None:
    scheduler = streaming(num_blocks=100)
    assert scheduler.num_certain_steps() == 8  # of 9 tokens to come, the last one ends a request


@pytest.mark.parametrize(("num_blocks", "num_steps"), [(8, 8), (7, 1), (4, 1)])
def test_a_run_ends_before_blocks_run_out(num_blocks: int, num_steps: int) -> None:
    scheduler = streaming(num_blocks=max(num_blocks, 9))
    scheduler.pool.allocate(scheduler.pool.num_free - (num_blocks - 4))  # to somebody else
    assert scheduler.num_certain_steps() == num_steps  # 8 + 1 tokens need a second block each
    free = scheduler.advance(0.0, [0.1 * (k + 1) for k in range(num_steps)], token_of)
    assert free[-1] == num_blocks - (4 if num_steps == 1 else 8)


def test_nothing_is_certain_while_a_prompt_is_computed_or_somebody_may_be_admitted() -> None:
    scheduler = streaming(num_blocks=100)
    load = Traffic((Arrival(0.0, 100, 5),) * 9)
    scheduler.add(load.request(8))
    assert scheduler.num_certain_steps() == 0
    batch = scheduler.schedule(0.0)
    assert max(len(item.token_ids) for item in batch.requests) > 1
    assert scheduler.num_certain_steps() == 0
    assert Scheduler(scheduler_config()).num_certain_steps() == 0  # nothing to do


def test_stretches_are_really_run_at_once() -> None:
    """Without this, the equality above could be that of the slow path with itself."""
    calls = 0

    def counted(shape: Any) -> float:
        nonlocal calls
        calls += 1
        return step_time(shape)

    spec = replica()
    spec = replace(spec, next_token_times=step_by_step(counted))  # of stretches only
    one = Replica(spec, on_end=lambda _update: None)
    load = mixed_load(3, mean_gap_s=0.5)
    for index, arrival in enumerate(load.arrivals):
        one.offer(load.request(index), arrival.arrival_s)
    one.run_until(float("inf"))
    assert calls > len(one.steps) / 2
