"""Loads, prices and schedulers that the planner's tests share."""

from random import Random
from typing import Any

from duetto.core.config import SchedulerConfig
from duetto.core.shape import BatchShape
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.simulation import Fleet
from duetto.simulation.workload import Arrival, Traffic


def step_time(shape: BatchShape) -> float:
    """A price with the terms of a real one; seconds."""
    num_tokens = sum(r.num_new for r in shape.requests)
    num_read = sum(r.num_new + r.num_past for r in shape.requests)
    return 0.004 + 3e-5 * num_tokens + 1e-6 * num_read


def scheduler_config(**changes: Any) -> SchedulerConfig:
    defaults = {
        "num_blocks": 256,
        "max_model_len": 512,
        "block_size": 8,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
    }
    return SchedulerConfig(**{**defaults, **changes})


def replica(**changes: Any) -> ReplicaSpec:
    return ReplicaSpec(scheduler=scheduler_config(**changes), step_time=step_time)


def fleet(num_replicas: int = 1, **changes: Any) -> Fleet:
    return Fleet(replica=replica(**changes), num_replicas=num_replicas)


def mixed_load(
    seed: int,
    *,
    num_requests: int = 60,
    mean_gap_s: float = 0.05,
    longest_prompt: int = 200,
    longest_answer: int = 80,
) -> Traffic:
    """Shared beginnings, bursts, and lengths from one token up."""
    rng = Random(seed)
    time, arrivals = 0.0, []
    for _ in range(num_requests):
        time += 0.0 if rng.random() < 0.3 else rng.expovariate(1 / mean_gap_s)
        num_prompt = rng.randint(1, longest_prompt)
        hash_ids = tuple(rng.randint(0, 2) for _ in range(rng.randint(0, num_prompt // 16)))
        arrivals.append(Arrival(time, num_prompt, rng.randint(1, longest_answer), hash_ids))
    return Traffic(tuple(arrivals), hash_block=16)
