"""Pipelines: batches overlap in the stages, as the closed forms say, and no number is made up."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from pricing.prices import A100, decode, model, program
from simulation.loads import mixed_load, scheduler_config
from simulation.loads import step_time as price
from simulation.test_fast_forward import CONFIGURATIONS, everything

from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout, check_used
from duetto.pricing.cost_model import Deployment
from duetto.pricing.memory import fit_device
from duetto.simulation.executor import step_by_step
from duetto.simulation.pipeline import Passage, Pipeline, PipelineSpec
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import Fleet, Simulation, simulate
from duetto.simulation.workload import Arrival, Traffic


def pipelined(
    passage: Callable[[BatchShape], Passage], num_stages: int, num_batches: int, **changes: Any
) -> Fleet:
    spec = PipelineSpec(
        num_stages=num_stages,
        num_batches=num_batches,
        passage=passage,
        next_passages=step_by_step(passage),
    )
    return Fleet(
        replica=ReplicaSpec(
            scheduler=scheduler_config(**changes),
            step_time=lambda shape: passage(shape).alone_s,
            num_devices=num_stages,
            pipeline=spec,
        )
    )


# --- the stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "parts"), [(1, 1), (1, 5), (2, 1), (2, 7), (4, 4), (4, 64)])
def test_equal_stages_fill_and_drain_as_the_closed_form_says(stages: int, parts: int) -> None:
    pipeline, second = Pipeline(stages), 0.25
    ends = [pipeline.enter(0.0, Passage((second,) * stages)) for _ in range(parts)]
    assert ends == [second * (stages + part) for part in range(parts)]
    bubble = 1 - pipeline.computed_s / (stages * ends[-1])
    assert bubble == pytest.approx((stages - 1) / (parts + stages - 1))


def test_a_batch_alone_takes_the_sum_of_stages_and_sends() -> None:
    passage = Passage((1.0, 3.0, 0.5), 0.25)
    assert Pipeline(3).enter(10.0, passage) == 10 + 4.5 + 2 * 0.25
    assert passage.alone_s == 5.0


def test_batches_follow_each_other_as_the_slowest_stage_lets_them() -> None:
    rng = Random(1)
    for _ in range(20):
        passage = Passage(tuple(rng.uniform(0.1, 1) for _ in range(rng.randint(2, 6))), 0.01)
        pipeline = Pipeline(len(passage.stages_s))
        ends = [pipeline.enter(0.0, passage) for _ in range(30)]
        gaps = [b - a for a, b in pairwise(ends)]
        assert gaps == pytest.approx([max(passage.stages_s)] * 29)


def test_the_price_of_parts_is_the_time_that_the_stages_take() -> None:
    for parts in (1, 3, 8):
        deployment = Deployment(pipeline_parallel=4, micro_batches=parts, graphs=True)
        found = model("llama-3.2-1b", A100, deployment)
        totals = found.totals(decode(8, 500))
        one = totals.part(parts)
        passage, pipeline = Passage(found.stage_times(one), found.send_time(one)), Pipeline(4)
        end = max(pipeline.enter(0.0, passage) for _ in range(parts))
        assert found.time_of(totals) == pytest.approx(end, rel=0.01)


# --- engines that share them ----------------------------------------------------------------------


def streams(num_requests: int, num_tokens: int) -> Traffic:
    return Traffic((Arrival(0.0, 1, num_tokens),) * num_requests)


@pytest.mark.parametrize(("stages", "batches"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (3, 7)])
def test_as_many_batches_as_stages_leave_no_bubble(stages: int, batches: int) -> None:
    """One stream in each batch; every stage takes 10 ms."""
    fleet = pipelined(lambda _shape: Passage((0.01,) * stages), stages, batches)
    run = simulate(streams(batches, 200), fleet)
    use = sum_up(run, fleet.num_devices).pools["serve"]
    assert use.bubble == pytest.approx(1 - min(1, batches / stages), abs=0.01)
    rate = batches * 200 / run.duration_s
    assert rate == pytest.approx(100 * min(1, batches / stages), rel=0.02)
    gaps = {round(b - a, 9) for s in run.served for a, b in pairwise(s.timings.token_times)}
    assert gaps == {0.01 * max(stages, batches)}
    assert use.mean_running == pytest.approx(batches, rel=0.05)


def uneven(shape: BatchShape) -> Passage:
    one = price(shape)
    return Passage((0.3 * one, 0.5 * one, 0.2 * one), 1e-4)


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("mean_gap_s", [0.02, 0.4])
def test_fast_and_slow_agree_in_every_number(changes: dict[str, Any], mean_gap_s: float) -> None:
    for batches in (1, 2, 5):
        load = mixed_load(batches, mean_gap_s=mean_gap_s, num_requests=40)
        fleet = pipelined(uneven, 3, batches, **changes)
        fast, slow = (simulate(load, fleet, fast=fast) for fast in (True, False))
        assert everything(fast) == everything(slow)
        assert fast.computed_s == pytest.approx(slow.computed_s)


def overlaps(run: Simulation) -> bool:
    """Whether two batches were under way at one time."""
    spans = sorted(
        span for log in run.steps for span in zip(log.start_time, log.end_time, strict=True)
    )
    return any(end > start for (_, end), (start, _) in pairwise(spans))


def test_every_request_is_answered_whole_and_steps_of_an_engine_do_not_overlap() -> None:
    load = mixed_load(3, num_requests=60)
    run = simulate(load, pipelined(uneven, 3, 4, num_blocks=64))
    for served, arrival in zip(run.served, load.arrivals, strict=True):
        assert len(served.timings.token_times) == arrival.num_output_tokens
        parts = sum(served.timings.parts.values())
        assert parts == pytest.approx(served.timings.token_times[-1] - arrival.arrival_s)
    assert overlaps(run)
    assert len(run.steps) == 4
    for log in run.steps:
        assert all(a <= b for a, b in zip(log.end_time, log.start_time[1:], strict=False))


# --- layouts --------------------------------------------------------------------------------------


def rate(layout: Layout) -> float:
    """Requests/s."""
    run = simulate(at_once(), make_fleet(program("llama-3-8b"), A100, layout))
    return len(run.served) / run.duration_s


def at_once() -> Traffic:
    return Traffic((Arrival(0.0, 512, 64),) * 300)


def test_four_stages_serve_nearly_four_times_as_much() -> None:
    alone = rate(Layout(graphs=True))
    assert rate(Layout(pp=4, graphs=True)) > 2.8 * alone
    assert rate(Layout(pp=4, graphs=True, micro_batches=1)) < 1.05 * alone


def test_batches_share_the_blocks() -> None:
    llama = program("llama-3-8b")
    whole = make_fleet(llama, A100, Layout(pp=2, micro_batches=1)).replica
    shared = make_fleet(llama, A100, Layout(pp=2, micro_batches=4)).replica
    assert shared.num_batches == 4
    assert shared.scheduler.num_blocks == whole.scheduler.num_blocks // 4
    assert shared.scheduler.max_num_seqs == whole.scheduler.max_num_seqs == 64
    assert make_fleet(llama, A100, Layout(pp=4)).replica.num_batches == 4


def test_a_request_that_one_batch_has_no_room_for_is_refused_with_what_would_do() -> None:
    small = replace(A100, memory_bytes=12 * 2**30)
    layout = Layout(pp=2, micro_batches=8, max_model_len=8000, max_num_batched_tokens=512)
    with pytest.raises(ConfigError, match=r"--micro-batches [1-7] would do"):
        make_fleet(program("llama-3-8b"), small, layout)
    with pytest.raises(ConfigError, match="--micro-batches: must be 1 or more"):
        Layout(micro_batches=0)
    with pytest.raises(ConfigError, match="--micro-batches 4: needs --pp"):
        check_used(Layout(micro_batches=4))


def test_prompts_computed_apart_go_through_stages_too() -> None:
    layout = Layout(pp=2, prefill_replicas=1, graphs=True)
    run = simulate(at_once(), make_fleet(program("llama-3-8b"), A100, layout))
    assert all(s.transfer_s > 0 and len(s.timings.token_times) == 64 for s in run.served)
    uses = sum_up(run, 4).pools
    assert uses["prefill"].bubble < 0.1
    assert uses["decode"].num_batches == uses["prefill"].num_batches == 2


@pytest.mark.parametrize("pp", [1, 2, 3, 8])
def test_each_stage_keeps_its_own_layers(pp: int) -> None:
    """Llama 2 7B at 2 bytes: a layer has 202 M numbers, embedding and head 131 M each."""
    found = fit_device(
        program("llama-2-7b"),
        A100,
        Layout(pp=pp).deployment(program("llama-2-7b")),
        block_size=32,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        utilization=0.9,
    )
    layers = -(-32 // pp)
    assert found.block_bytes == layers * 32 * 2 * 4096 * 2
    ends = 262.1 if pp == 1 else 131.1
    assert found.weight_bytes == pytest.approx(2e6 * (layers * 202.4 + ends), rel=0.01)
