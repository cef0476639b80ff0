"""step_time against the program's own operations, priced one by one; parallelism; refusals."""

import json
import random
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
from pricing.prices import A100, ROUGH, decode, model, prefill, program

from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.models.programs import build_program
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.gpus import GPU_EFFICIENCIES
from duetto.pricing.hardware import CachedWeights, Efficiencies, HardwareSpec
from duetto.program.collectives import AllReduce
from duetto.program.ops import Attention, Embed, Linear, Ref, WriteKV
from duetto.program.program import Program
from duetto.program.rewrites.shard import shard
from duetto.program.rewrites.stages import stages
from duetto.program.shape import SELECTED, Precision

QUANTIZED = Precision(weight_bytes=0.5625, activation_bytes=2.0, kv_bytes=1.03125)


def windowed() -> Program:
    """Gemma 2, small: windows on every other layer, soft caps, norms behind each branch."""
    config = {
        "model_type": "gemma2",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "sliding_window": 64,
        "rms_norm_eps": 1e-6,
    }
    return build_program(parse_config(JsonSection(Path("gemma"), config)))


def shapes() -> list[BatchShape]:
    random.seed(5)
    some = [
        BatchShape(
            tuple(
                RequestShape(
                    random.choice((1, 1, 1, 7, 300)), random.randrange(900), random.randrange(2)
                )
                for _ in range(random.randrange(1, 40))
            )
        )
        for _ in range(20)
    ]
    return [decode(1, 0), decode(64, 900), prefill(1, 500), *some]


def one_by_one(
    found: Program, hardware: HardwareSpec, precision: Precision, shape: BatchShape
) -> float:
    """The slow twin: every operation of every layer by its own price, no sums and no counting."""
    total = hardware.efficiencies.step_s
    total += hardware.efficiencies.logit_row_s * shape.num_logit_rows
    for op in found.ops:
        cost, reached = op.cost(shape, precision), hardware.efficiencies.of(op.kind)
        is_product = isinstance(op, Linear | Attention)
        peak = hardware.peaks["bfloat16" if is_product else "float32"]
        rows = shape.num_logit_rows if op.rows == SELECTED else shape.num_tokens
        if not rows:
            continue
        flops = cost.flops
        if not isinstance(op, Attention):
            flops = cost.flops / rows * (rows + reached.half_rows)
        compute_s = flops / (peak * reached.compute)
        memory_s = cost.bytes_moved / (hardware.memory_bandwidth * reached.memory)
        total += max(compute_s, memory_s) + reached.call_s + reached.row_s * rows
    return total


@pytest.mark.parametrize("precision", [Precision(), QUANTIZED], ids=["bf16", "int4"])
@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b", "llama-3.2-1b", "gemma"])
def test_step_time_is_the_sum_over_operations(name, precision):
    found = windowed() if name == "gemma" else program(name)
    fast = CostModel(found, ROUGH, Deployment(precision=precision))
    for shape in shapes():
        assert fast.step_time(shape) == pytest.approx(
            one_by_one(found, ROUGH, precision, shape), rel=1e-6
        )


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_priced_work_is_the_programs_own(name):
    found = windowed() if name == "gemma" else program(name)
    fast = CostModel(found, ROUGH, Deployment())
    for shape in shapes():
        cost, rows = found.cost(shape, Precision()), fast.price(shape)
        assert sum(row.flops for row in rows) == pytest.approx(cost.flops)
        assert sum(row.bytes_moved for row in rows) == pytest.approx(cost.bytes_moved)


@pytest.mark.parametrize(("tp", "pp", "parts"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 4, 3)])
@pytest.mark.parametrize("hardware", [ROUGH, A100], ids=["rough", "a100"])
def test_rows_add_up_to_the_step(hardware, tp, pp, parts):
    deployment = Deployment(tensor_parallel=tp, pipeline_parallel=pp, micro_batches=parts)
    found = model("llama-3.2-1b", hardware, deployment)
    for shape in shapes():
        rows = found.price(shape)
        assert sum(row.time_s for row in rows) == pytest.approx(found.step_time(shape))
        assert all(row.time_s >= -1e-12 for row in rows)


def test_more_work_never_takes_less_time():
    for hardware in (ROUGH, A100):
        found = model("llama-3.2-1b", hardware)
        base = (RequestShape(1, 500),) * 8
        before = found.step_time(BatchShape(base))
        for extra in range(0, 600, 7):
            chunk = RequestShape(extra + 1, 100, 0)
            after = found.step_time(BatchShape((*base, chunk)))
            assert after >= before
            before = after


def test_a_step_time_is_cheap():
    found, shape = model("llama-3.2-1b", A100), decode(64, 900)
    found.step_time(shape)
    fastest = min(_seconds(found, shape) for _ in range(20))
    assert fastest < 1e-3  # some 50 us on a quiet machine; op by op it is 10 ms


def _seconds(found: CostModel, shape: BatchShape) -> float:
    start = perf_counter()
    found.step_time(shape)
    return perf_counter() - start


def test_a_step_without_logits_has_no_head():
    found = model("tiny")
    names = {row.name for row in found.price(BatchShape((RequestShape(5, 0, 0),)))}
    assert names & {"lm_head", "select_rows", "norm"} == set()


def test_bounds_are_named():
    prompt = {row.name: row.bound for row in model("llama-2-7b", A100).price(prefill(1, 1000))}
    token = {row.name: row.bound for row in model("llama-2-7b", A100).price(decode(1, 1000))}
    assert prompt["gate+up_proj"] == prompt["down_proj"] == "compute"
    assert token["gate+up_proj"] == token["lm_head"] == "memory"
    assert token["input_layernorm"] == "overhead"


# --- parallelism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_share_the_work(tp):
    shape = prefill(2, 300)
    whole = {row.name: row for row in model("llama-3-8b").price(shape)}
    share = model("llama-3-8b", ROUGH, Deployment(tensor_parallel=tp))
    own = {row.name: row for row in share.price(shape)}
    for name in ("q+k+v_proj", "o_proj", "gate+up_proj", "down_proj", "attention", "lm_head"):
        assert own[name].flops == pytest.approx(whole[name].flops / tp)
    assert own["input_layernorm"].flops == whole["input_layernorm"].flops  # each computes it
    assert own["all_reduce"].count == 2 * 32 + 1  # after each block's two halves, and the embedding
    sent = 600 * 4096 * 2 * 2 * (tp - 1) / tp  # tokens · hidden · bytes · ring
    assert own["all_reduce"].bytes_moved == pytest.approx(65 * sent)


def test_kv_heads_that_are_too_few_are_kept_by_several_ranks():
    ops = shard(program("qwen2.5-0.5b"), 14).ops  # 14 heads over 2 KV heads
    attention = next(op for op in ops if isinstance(op, Attention))
    qkv = next(op for op in ops if isinstance(op, Linear))
    stored = next(op for op in ops if isinstance(op, WriteKV))
    assert (attention.num_heads, attention.num_kv_heads) == (1, 1)
    assert qkv.out.width == 3 * 64
    assert stored.k.width == stored.v.width == 64


def test_every_kind_of_program_can_be_cut():
    ops = shard(windowed(), 2).ops
    assert sum(op.kind == "collective" for op in ops) == 4 * 2 + 2


def test_an_all_reduce_is_a_ring():
    link = AllReduce(Ref("x", 0, 1000), 4)
    sent = link.cost(decode(1, 0), Precision(activation_bytes=1)).bytes_moved
    assert (link.hops, sent) == (6, 1500)
    found = model("tiny", ROUGH, Deployment(tensor_parallel=2))
    row = found.price_op(AllReduce(Ref("x", 0, 64), 4), decode(10, 0))
    sent = 10 * 64 * 1.5 * 2
    assert row.bytes_moved == sent
    assert row.time_s == pytest.approx(sent / (50e9 * 0.5) + 6 * 3e-6 + 9e-6)


def test_stages_are_whole_layers_in_order():
    found = program("llama-3.2-1b")
    cut = [stage.ops for stage in stages(found, 3)]
    assert [op for stage in cut for op in stage] == list(found.ops)
    assert [sum(isinstance(op, Attention) for op in stage) for stage in cut] == [6, 5, 5]
    assert isinstance(cut[0][0], Embed)
    assert isinstance(cut[2][-1], Linear)


def test_a_pipeline_is_no_faster_for_one_batch_and_waits():
    shape, whole = decode(8, 500), model("llama-3.2-1b")
    cut = model("llama-3.2-1b", ROUGH, Deployment(pipeline_parallel=4))
    sends = 3 * (8 * 2048 * 2 / (50e9 * 0.5) + 3e-6 + 9e-6)
    assert cut.step_time(shape) == pytest.approx(whole.step_time(shape) + sends)
    rows = {row.name: row.time_s for row in cut.price(shape)}
    work = cut.step_time(shape) - ROUGH.efficiencies.step_s - 8 * ROUGH.efficiencies.logit_row_s
    assert rows["bubble"] == pytest.approx(0.75 * work, rel=0.01)  # (stages - 1) / stages
    assert cut.stage_time(shape) < whole.step_time(shape) / 2


def test_parts_of_a_batch_fill_a_pipeline():
    """Compute-bound: with m parts through s stages the bubble is (s - 1) / (m + s - 1)."""
    shape = prefill(8, 2000)
    ideal = replace(ROUGH.ideal(), link_latency_s=0.0, link_bandwidth=1e15)
    times = {
        parts: model(
            "llama-2-7b", ideal, Deployment(pipeline_parallel=4, micro_batches=parts)
        ).step_time(shape)
        for parts in (1, 4)
    }
    assert times[4] / times[1] == pytest.approx((4 + 4 - 1) / 4 / 4, rel=0.02)


def test_launches_hide_behind_the_device_and_graphs_leave_the_host_out():
    slow = replace(GPU_EFFICIENCIES, launch_s=1e-3, chunk_launch_s=1e-3)
    hardware = replace(A100, efficiencies=slow)
    eager = model("tiny", hardware)
    num_calls = len(program("tiny").ops)
    host_s = slow.step_s + slow.logit_row_s
    assert eager.step_time(decode(1, 10)) == pytest.approx(num_calls * 1e-3 + host_s)
    assert eager.step_time(prefill(1, 2)) == pytest.approx(num_calls * 2e-3 + host_s)
    graphs = model("tiny", hardware, Deployment(graphs=True))
    for shape in (decode(1, 10), prefill(1, 2)):
        kernels_s = sum(row.time_s for row in eager.price(shape) if row.kind != "overhead")
        assert graphs.step_time(shape) == pytest.approx(kernels_s)
    faster = model("tiny", replace(hardware, host_speed=2.0))
    assert faster.step_time(decode(1, 10)) == pytest.approx(eager.step_time(decode(1, 10)) / 2)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deployment", "words"),
    [
        (Deployment(tensor_parallel=3), "--tp: 3 does not divide .* 2, 4"),
        (Deployment(tensor_parallel=0), "--tp: must be 1 or more"),
        (Deployment(pipeline_parallel=33), "--pp: 33 stages .* 1 to 32"),
        (Deployment(micro_batches=0), "micro-batches: must be 1 or more"),
        (Deployment(arithmetic="float8"), "no peak for float8 .* float32, bfloat16"),
        (Deployment(tensor_parallel=8, pipeline_parallel=8), "64 devices, .* there are 40"),
    ],
)
def test_what_cannot_be_is_refused(deployment, words):
    with pytest.raises(ConfigError, match=words):
        model("llama-3-8b", replace(ROUGH, num_devices=40), deployment)


def test_ranks_need_a_link():
    with pytest.raises(ConfigError, match="no link"):
        model("llama-3-8b", replace(ROUGH, link_bandwidth=0.0), Deployment(tensor_parallel=2))


def test_prices_can_be_written_as_json():
    rows = model("tiny").price(decode(1, 10))
    assert json.dumps([row.intensity for row in rows])


def test_a_model_that_caches_hold_has_their_prices():
    warm = replace(ROUGH, memory_bandwidth=5e12, efficiencies=Efficiencies(step_s=1e-5))
    weights = 2 * program("tiny").num_parameters
    caching = replace(
        ROUGH,
        read_bandwidths=((weights, 5e12), (100 * weights, 1e12)),
        cached=CachedWeights(most_bytes=weights, efficiencies=warm.efficiencies),
    )
    for shape in (decode(1, 10), prefill(2, 300)):
        expected = model("tiny", warm).step_time(shape)
        assert model("tiny", caching).step_time(shape) == expected
        assert model("tiny", ROUGH).on(caching).step_time(shape) == expected
        large = model("llama-3.2-1b", caching).step_time(shape)
        assert large == model("llama-3.2-1b", ROUGH).step_time(shape)


def test_a_share_of_a_model_may_stay_in_the_caches_of_one_device():
    of_a_device = (
        2 * program("llama-3.2-1b").num_parameters // 4 + 2**20
    )  # norms are not shared out
    caching = replace(
        ROUGH, cached=CachedWeights(most_bytes=of_a_device, efficiencies=Efficiencies())
    )
    found = [
        model("llama-3.2-1b", caching, Deployment(tensor_parallel=tp)).hardware.efficiencies
        for tp in (1, 2, 4, 8)
    ]
    assert found == [ROUGH.efficiencies, ROUGH.efficiencies, Efficiencies(), Efficiencies()]
