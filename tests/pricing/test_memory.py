"""Memory of a deployment, by hand."""

import pytest

from duetto.core.errors import ConfigError
from duetto.models.find import find_program
from duetto.pricing.cost_model import Deployment
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.memory import MemoryFit, fit_device, num_requests
from duetto.program.shape import Precision

GIB = 2**30
DEVICE = HardwareSpec(
    name="a device",
    peaks={"bfloat16": 1e14},
    memory_bandwidth=1e12,
    memory_bytes=80 * GIB,
    link_bandwidth=1e11,
)


def fit(
    model: str, tp: int = 1, pp: int = 1, weight_bytes: float = 2.0, utilization: float = 1.0
) -> MemoryFit:
    return fit_device(
        find_program(model),
        DEVICE,
        Deployment(
            tensor_parallel=tp,
            pipeline_parallel=pp,
            precision=Precision(weight_bytes, 2.0, 2.0),
        ),
        block_size=16,
        max_num_batched_tokens=512,
        max_num_seqs=64,
        utilization=utilization,
    )


def test_the_textbook_sizes() -> None:
    llama2, llama3 = fit("llama-2-7b"), fit("llama-3-8b")
    assert llama2.weight_bytes == pytest.approx(13.5e9, rel=0.01)
    assert llama2.block_bytes * (4096 // 16) == 2 * GIB
    assert llama3.weight_bytes == pytest.approx(16.06e9, rel=0.001)
    assert fit("llama-3-8b", weight_bytes=1.0).weight_bytes == pytest.approx(8.03e9, rel=0.001)
    assert llama3.block_bytes == 16 * 128 * 1024
    for each in (llama2, llama3):
        assert 0 <= each.left_bytes < each.block_bytes
        assert each.weight_bytes + each.activation_bytes + each.kv_bytes + each.left_bytes == (
            each.usable_bytes
        )


def test_tied_embeddings_are_held_once_but_by_both_ends_of_a_pipeline() -> None:
    program = find_program("qwen2.5-0.5b")
    whole = fit("qwen2.5-0.5b")
    assert whole.weight_bytes == 2 * program.num_parameters
    embedding = 2 * 151936 * 896
    half = fit("qwen2.5-0.5b", pp=2)
    expected = (whole.weight_bytes - embedding) / 2 + embedding
    assert half.weight_bytes == pytest.approx(expected, rel=1e-5)  # the last norm is one half's


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (8, 1), (1, 2), (4, 4)])
def test_devices_share_weights_and_kv(tp: int, pp: int) -> None:
    one, many = fit("llama-3-8b"), fit("llama-3-8b", tp, pp)
    assert many.block_bytes == one.block_bytes // (tp * pp)
    assert many.weight_bytes < 1.2 * one.weight_bytes / (tp * pp) + 2 * 128256 * 4096 / tp


def test_kv_heads_are_not_cut_below_one() -> None:
    cut, whole = fit("llama-3-8b", tp=16), fit("llama-3-8b", tp=8)
    assert cut.block_bytes == whole.block_bytes


def test_what_does_not_fit_has_no_blocks_and_says_by_how_much() -> None:
    large = fit("llama-3-70b")
    assert large.num_blocks == 0 and large.num_requests(100) == 0
    assert large.left_bytes == pytest.approx(80 * GIB - 141.1e9, rel=0.02)
    assert fit("llama-3-70b", tp=2, utilization=0.9).num_blocks > 0


def test_how_many_requests() -> None:
    assert num_requests(100, 16, 1600) == 1
    assert num_requests(100, 16, 1601) == 1  # the last token needs no KV
    assert num_requests(100, 16, 1602) == 0
    assert num_requests(100, 16, 17) == 100
    assert num_requests(100, 16, 1) == 100


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tp"):
        fit("llama-3-8b", tp=3)
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        fit("llama-3-8b", utilization=1.5)
