"""The cheapest layout that is good enough, and why not a cheaper one."""

import os
import threading
import time
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from signal import SIGINT

import pytest

from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.metrics import SLO
from duetto.measure.workload import Lengths
from duetto.models.find import find_program
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout, check_apart
from duetto.planner.objective import Objective
from duetto.planner.search import Problem, judge, layouts, search, why_not
from duetto.pricing.gpus import HARDWARE
from duetto.pricing.hardware import HardwareSpec
from duetto.simulation.workload import Arrival, Traffic, synthetic

PROGRAM = find_program("llama-3.2-1b", 4096)
BASE = Layout(max_num_seqs=64)


def hardware(num_devices: int, memory_gib: float = 80) -> HardwareSpec:
    """With datasheet numbers: what was fitted since changes nothing here."""
    memory = int(memory_gib * 2**30)
    return replace(HARDWARE["a100-80g"].ideal(), num_devices=num_devices, memory_bytes=memory)


def problem(rate: float = 20.0, num_devices: int = 4, **limits: float) -> Problem:
    load = synthetic(
        60,
        rate,
        input_lengths=Lengths(1000, "lognormal", 0.5, 3000),
        output_lengths=Lengths(30, "lognormal", 0.5, 500),
    )
    slo = SLO(**(limits or {"ttft": 0.5, "itl": 0.05}))
    return Problem(
        program=PROGRAM, hardware=hardware(num_devices), workload=load, objective=Objective(slo)
    )


def test_layouts_use_no_more_devices_than_there_are() -> None:
    found = layouts(PROGRAM, 4, base=BASE, budgets=(512, 1024), dtypes=("bfloat16", "int8"))
    assert len(found) == len(set(found))
    assert max(layout.num_devices for layout in found) == 4
    assert {(x.tp, x.pp, x.replicas, x.prefill_replicas) for x in found} >= {
        (1, 1, 4, 0),
        (1, 1, 1, 3),
        (2, 1, 1, 1),
        (4, 1, 1, 0),
        (1, 4, 1, 0),
        (2, 2, 1, 0),
    }
    whole = layouts(PROGRAM, 4, base=BASE, budgets=(512,), disaggregate=False)
    assert not any(layout.prefill_replicas for layout in whole)


def test_there_are_hundreds_of_layouts_for_eight_devices() -> None:
    program = find_program("llama-3.1-8b")
    assert len(layouts(program, 8, base=BASE)) >= 200


def test_there_is_an_end_to_what_can_be_tried() -> None:
    with pytest.raises(ConfigError, match="1024 devices can be used in more than 20000 ways"):
        layouts(PROGRAM, 1024, base=BASE)


def few(num_devices: int = 4) -> list[Layout]:
    return layouts(PROGRAM, num_devices, base=BASE, budgets=(1024,))


def test_the_best_meets_the_limits_with_the_fewest_devices() -> None:
    wanted = problem(rate=300.0, ttft=0.2, itl=0.2)
    candidates = few()
    found = search(wanted, candidates, num_processes=1)
    assert found.best is not None
    assert found.best.layout.num_devices > 1  # one is not enough: the search had to go on
    # The dumbest way: all of them, one after the other.
    judged = [judge(wanted, layout) for layout in candidates if not why_not(wanted, layout)]
    least = min(v.layout.num_devices for v in judged if v.is_met)
    best = min(
        (v for v in judged if v.is_met and v.layout.num_devices == least), key=lambda v: v.ratio
    )
    assert found.best == best
    assert found.best_smaller is not None
    assert not found.best_smaller.is_met
    assert found.best_smaller.binding in ("ttft", "itl")
    assert len(found.verdicts) == len(candidates)
    dearer = [v for v in found.verdicts if v.reason.startswith("dearer")]
    assert all(v.layout.num_devices > least for v in dearer)


def test_ctrl_c_waits_until_a_new_process_has_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any thread may take the signal: one whose mask lets it through stands for the pool's."""
    steps: list[str] = []

    def start(self: SpawnProcess) -> None:
        os.kill(os.getpid(), SIGINT)
        for _ in range(100):
            time.sleep(0.001)  # somewhere here Python heeds it
        steps.append("started")

    monkeypatch.setattr(SpawnProcess, "start", start)
    idle = threading.Event()
    unblocked = threading.Thread(target=idle.wait)
    unblocked.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            search(problem(), few(2), num_processes=2)
    finally:
        idle.set()
        unblocked.join()
    assert steps == ["started"]


def test_processes_change_nothing() -> None:
    wanted, candidates = problem(rate=70.0), few(2)
    assert search(wanted, candidates, num_processes=2) == search(
        wanted, candidates, num_processes=1
    )


def test_what_is_pruned_would_not_have_met_the_limits() -> None:
    """The bounds are bounds: simulated all the same, what they refuse fails."""
    wanted = problem(ttft=0.005, itl=0.001)
    refused = [layout for layout in few() if why_not(wanted, layout)]
    assert refused
    for layout in refused[:6]:
        assert not judge(wanted, layout).is_met


def test_a_bound_on_ttft_counts_what_a_cache_may_hold() -> None:
    """The second prompt is the first one's, so it may be answered at once."""
    arrivals = (Arrival(0.0, 2048, 2, (1, 2, 3, 4)), Arrival(9.0, 2049, 2, (1, 2, 3, 4)))
    cached = replace(problem(ttft=0.01), workload=Traffic(arrivals))
    cached = replace(cached, objective=Objective(SLO(ttft=0.01), 50.0))
    assert why_not(cached, BASE) is None
    assert why_not(replace(cached, objective=Objective(SLO(ttft=0.01), 100.0)), BASE) is not None


def test_limits_that_nothing_meets() -> None:
    found = search(problem(rate=1000.0, ttft=0.06), few(2), num_processes=1)
    assert found.best is None and found.runner_up is None
    nearest = found.verdicts[0]
    assert nearest.binding == "ttft"
    assert nearest.ratio == min(v.ratio for v in found.simulated) > 1


def test_limits_that_nothing_meets_even_alone() -> None:
    """The best that exists is known all the same, and it is the best of those that fit."""
    wanted, candidates = problem(ttft=1e-6), few(2)
    assert all(why_not(wanted, layout) for layout in candidates)
    found = search(wanted, candidates, num_processes=1)
    assert found.best is None and len(found.verdicts) == len(candidates)
    nearest = found.simulated[0]
    assert nearest == found.verdicts[0] and nearest.binding == "ttft"
    assert nearest.ratio == min(judge(wanted, layout).ratio for layout in candidates) > 1


def test_a_model_that_does_not_fit_is_told_with_what_would() -> None:
    tight = replace(problem(), hardware=hardware(2, memory_gib=2.5))
    refused = why_not(tight, BASE)
    assert refused is not None
    assert "2.3 GiB of weights" in refused.reason and "it fits with --tp 2" in refused.reason
    assert why_not(tight, replace(BASE, tp=2)) is None
    alone = why_not(replace(tight, hardware=hardware(1, memory_gib=2.5)), BASE)
    assert alone is not None  # an A100 has no float8
    assert "it fits with --dtype int8" in alone.reason
    tiny = replace(tight, hardware=hardware(1, memory_gib=0.7))
    beyond = why_not(tiny, BASE)
    assert beyond is not None
    assert "nothing that this machine offers would do, but with more devices" in beyond.reason
    assert "it fits with --tp 4" in beyond.reason
    found = search(tight, few(2), num_processes=1)
    assert all(v.layout.tp * v.layout.pp > 1 for v in found.simulated)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "--tp: 3 does not divide the model's heads; the nearest that do: 2, 4"),
        (Layout(pp=17), "--pp: 17 stages cannot be made of 16 layers"),
        (Layout(tp=2, replicas=3), "needs 6 devices, and there are 4; --replicas 2 would do"),
        (Layout(tp=8), "needs 8 devices, and there are 4; take fewer"),
    ],
)
def test_layouts_that_cannot_be(layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_fleet(PROGRAM, hardware(64 if layout.pp > 1 else 4), layout)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_bandwidth", 0.0),
        ("kv_bandwidth", -1.0),
        ("kv_bandwidth", float("nan")),
        ("max_local_prefill", -1),
    ],
)
def test_flags_of_a_split_are_checked_with_or_without_one(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .*: must be"):
        Layout(**{name: value})  # type: ignore[arg-type]


def test_flags_of_a_split_need_one() -> None:
    for layout in (Layout(kv_bandwidth=3.0), Layout(max_local_prefill=5)):
        with pytest.raises(ConfigError, match="needs --prefill-replicas"):
            check_apart(layout)
        check_apart(replace(layout, prefill_replicas=1))


@pytest.mark.parametrize(
    "name", ["tp", "pp", "replicas", "max_num_seqs", "max_num_batched_tokens", "block_size"]
)
def test_layouts_count_from_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: must be 1 or more"):
        Layout(**{name: 0})


def test_graphs_leave_out_the_launches_of_next_tokens() -> None:
    """A next token of a small model on a fast device waits for the host's launches."""

    def next_token_s(layout: Layout) -> float:
        step_time = make_fleet(PROGRAM, HARDWARE["h100"], layout).replica.step_time
        return step_time(BatchShape((RequestShape(1, 500),)))

    launches = HARDWARE["h100"].efficiencies.launch_s
    with_host = next_token_s(replace(BASE, graphs=False))
    assert with_host - next_token_s(replace(BASE, graphs=True)) > 10 * launches
    assert next_token_s(BASE) == next_token_s(replace(BASE, graphs=True))  # assumed of GPUs


def test_a_queue_between_the_first_token_and_the_second_is_seen() -> None:
    """Apart, decoding is overloaded: few gaps of many are long, but every request has one."""
    wanted = problem(rate=100.0, itl=0.05)
    layout = replace(BASE, prefill_replicas=3, max_num_seqs=2)
    verdict = judge(wanted, layout)
    assert not verdict.is_met


def test_a_layout_that_can_serve_nothing_does_not_end_the_search() -> None:
    wanted = problem(rate=1.0, ttft=60.0)
    found = search(wanted, [replace(BASE, max_model_len=32), BASE], num_processes=1)
    assert found.best is not None and found.best.layout == BASE
    assert any("no request can be served" in v.reason for v in found.verdicts)


def test_an_objective_has_limits_and_a_percentile() -> None:
    with pytest.raises(ConfigError, match="--slo: needs at least one limit"):
        Objective(SLO())
    with pytest.raises(ConfigError, match="--percentile 0"):
        Objective(SLO(ttft=1), 0.0)


def test_refused_requests_miss_every_limit() -> None:
    wanted = problem(rate=1.0, ttft=60.0)
    short = replace(BASE, max_model_len=600)
    verdict = judge(wanted, short)
    assert verdict.ratio == float("inf")
