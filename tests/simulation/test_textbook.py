"""The cases that everybody works by hand (and the mistakes that everybody makes), exactly."""

import pytest
from pricing.prices import A100, decode, model, prefill, program

from duetto.core.shape import BatchShape, RequestShape
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.find_hardware import find_hardware
from duetto.pricing.roofline import roofline, turning_batch
from duetto.program.shape import Precision

GIB = 2**30


def test_llama_2_7b_in_fp16():
    found = program("llama-2-7b")
    assert found.num_parameters == 6_738_415_616
    assert found.num_parameters * 2 / 1e9 == pytest.approx(13.5, abs=0.03)
    assert found.kv_bytes_per_token(2) * 4096 == 2 * GIB


def test_llama_3_8b():
    found = program("llama-3-8b")
    assert found.num_parameters == 8_030_261_248
    assert found.num_parameters * 2 / 1e9 == pytest.approx(16, abs=0.1)
    assert found.num_parameters * 1 / 1e9 == pytest.approx(8, abs=0.1)
    assert found.kv_bytes_per_token(2) == 128 * 1024  # 8 KV heads, not 32


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-70b", 68.98),
        ("llama-3-70b", 70.55),
        ("llama-3.2-1b", 1.236),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.616),
        ("bloom-176b", 176.25),
    ],
)
def test_parameters_of_other_published_models(name, billions):
    assert program(name).num_parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_balance_point_of_an_a100():
    assert 312e12 / 2.0e12 == 156  # as it is usually reckoned; 2.039 TB/s is the data sheet
    assert A100.balance("bfloat16") == pytest.approx(312e12 / 2.039e12)
    assert find_hardware("h100").balance("bfloat16") == pytest.approx(295, abs=1)


def test_prefill_of_a_7b_is_bound_by_compute_and_decode_by_memory():
    found = model("llama-2-7b", A100.ideal())
    times: dict[str, dict[str, float]] = {}
    for name, shape in (("prefill", prefill(1, 1000)), ("decode", decode(1, 1000))):
        times[name] = {"compute": 0.0, "memory": 0.0}
        for row in found.price(shape):
            if row.time_s:
                times[name][row.bound] += row.time_s
    assert times["prefill"]["compute"] > 0.8 * sum(times["prefill"].values())
    assert times["decode"]["compute"] == 0
    # 2 · 6.6e9 · 1000 FLOP at 312 TFLOPS, and its elementwise traffic besides
    assert found.step_time(prefill(1, 1000)) == pytest.approx(13.2e12 / 312e12, rel=0.25)
    # 13.2 GB of weights and 0.5 GB of KV at 2.039 TB/s
    assert found.step_time(decode(1, 1000)) == pytest.approx(13.74e9 / 2.039e12, rel=0.01)


@pytest.mark.parametrize(("hardware", "batch"), [("a100", 153), ("h100", 295)])
def test_the_batch_at_which_decode_turns_compute_bound(hardware, batch):
    """B* = peak · bytes per weight / (2 · bandwidth); activations are moved too, so somewhat more.

    With weights of half the bytes and the same arithmetic, half of it.
    """
    ideal = find_hardware(hardware).ideal()
    found = turning_batch(model("llama-2-7b", ideal))
    assert found is not None
    assert batch <= found < 1.2 * batch
    int8 = Deployment(precision=Precision(1.0, 2.0, 2.0))
    half = turning_batch(model("llama-2-7b", ideal, int8))
    assert half is not None
    assert batch / 2 <= half < 1.2 * batch / 2


def test_attention_of_decode_never_turns_compute_bound():
    """Its intensity is query heads per KV head (in 2 bytes): batching does not help."""
    for name, intensity in (("llama-2-7b", 1), ("llama-3-8b", 4), ("llama-3-70b", 8)):
        for batch in (1, 512):
            rows = model(name, A100.ideal()).price(decode(batch, 8000))
            attention = next(row for row in rows if row.name == "attention")
            assert attention.bound == "memory"
            assert attention.intensity == pytest.approx(intensity, rel=0.05)  # softmax counts too


def test_gqa_reads_kv_heads_not_query_heads():
    row = next(r for r in model("llama-3-8b").price(decode(1, 1023)) if r.name == "attention")
    q_and_out = 2 * 32 * 4096 * 2
    assert row.bytes_moved == 1024 * 128 * 1024 + q_and_out


def test_tied_embeddings_are_one_matrix_that_the_head_still_reads():
    tied, head = program("qwen2.5-0.5b"), 151936 * 896
    assert tied.num_parameters == 494_032_768  # 0.36 B in layers and one 0.136 B matrix, not two
    row = next(r for r in model("qwen2.5-0.5b").price(decode(1, 0)) if r.name == "lm_head")
    assert row.flops == 2 * head
    assert row.bytes_moved == pytest.approx(2 * head, rel=0.01)
    embed = next(r for r in model("qwen2.5-0.5b").price(decode(1, 0)) if r.name == "embed")
    assert embed.bytes_moved == 2 * 896 * 2  # one row, in and out: not the matrix


def test_the_head_is_for_the_rows_that_are_wanted():
    rows = {r.name: r for r in model("llama-3-8b").price(prefill(3, 500))}
    assert rows["lm_head"].flops == 2 * 3 * 4096 * 128256
    whole = BatchShape((RequestShape(500, 0, 500),))
    rows = {r.name: r for r in model("llama-3-8b").price(whole)}
    assert rows["lm_head"].flops == 2 * 500 * 4096 * 128256


def test_causal_attention_is_half_of_the_square():
    rows = {r.name: r for r in model("llama-3-8b").price(prefill(1, 1000))}
    pairs = 1000 * 1001 // 2
    assert rows["attention"].flops == 32 * pairs * 32 * (4 * 128 + 5)


def test_head_dim_is_the_configured_one():
    """Llama-3.2-1B has 64, as hidden / heads; a config may say otherwise, as Qwen 3's do."""
    rows = {r.name: r for r in model("llama-3.2-1b").price(decode(1, 0))}
    assert rows["q+k+v_proj"].flops == 16 * 2 * 2048 * (32 + 2 * 8) * 64


def test_the_figures_to_check_by_hand():
    found = roofline(program("llama-3-8b"), A100.ideal(), Deployment(), batch=1, context=1000)
    sanity = found.sanity
    assert sanity.flops_per_token == 2 * sanity.parameters == 2 * 8_030_261_248
    assert sanity.matrix_parameters == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert sanity.kv_bytes_per_token == 128 * 1024
    assert sanity.weight_bytes["bfloat16"] == 2 * 8_030_261_248
    assert sanity.weight_bytes["int8"] == 8_030_261_248


def test_a_step_is_a_sum_of_maxima_not_a_maximum_of_sums():
    found = CostModel(program("llama-3-8b"), A100.ideal(), Deployment())
    shape = decode(300, 1200)  # products bound by compute, attention by memory
    cost = program("llama-3-8b").cost(shape, Precision())
    of_sums = max(cost.flops / 312e12, cost.bytes_moved / 2.039e12)
    assert found.step_time(shape) > 1.15 * of_sums
