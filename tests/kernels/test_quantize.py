"""Quantization in torch: the numbers and scales of the CPU's packing; bounds of e4m3's errors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from duetto.backends.cpu.native import choose_isa, native, why_unavailable
from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.linear import widened_matrix
from duetto.backends.cuda.quantize import put_rows
from duetto.backends.cuda.tensors import Matrix

INT8, INT4, FP8 = GpuFormat("int8", 128), GpuFormat("int4", 64), GpuFormat("fp8")


def empty(format: GpuFormat, num_outputs: int, num_inputs: int) -> Matrix:
    shape = (num_outputs, num_inputs)
    if format == FP8:
        return Matrix(
            format, shape, torch.empty(shape).to(torch.float8_e4m3fn), torch.empty(shape[0])
        )
    groups = -(-num_inputs // format.group)
    scales = torch.full((groups, num_outputs), 7.0).t()
    if format == INT8:
        return Matrix(format, shape, torch.full(shape, 7, dtype=torch.int8), scales)
    data = torch.full((num_outputs, groups * format.group // 2), 7, dtype=torch.uint8)
    return Matrix(format, shape, data, scales)


def rows_of(num_outputs: int, num_inputs: int) -> Tensor:
    """Numbers as weights have them, and groups that are zero, tiny, equal, or have one outlier."""
    generator = torch.Generator().manual_seed(num_outputs * num_inputs)
    rows = torch.randn(num_outputs, num_inputs, generator=generator)
    rows *= torch.exp(2 * torch.randn(num_outputs, 1, generator=generator))
    rows[0], rows[1], rows[2] = 0, 1e-31, 0.25
    rows[3, ::2], rows[3, 1::2] = 1.5, -1.5  # the first of equals decides
    rows[4, 5], rows[5, 5] = 100, -100
    rows[6] *= 1e18  # squares overflow
    rows[7] *= 1e-25
    return rows


def packed_on_the_cpu(format: GpuFormat, rows: Tensor) -> np.ndarray:
    if why_unavailable() is not None:
        pytest.skip("no native module")
    n, k = rows.shape
    sizes = native.packed_bytes(format.kind, format.group, n, k)
    data, scales = (torch.zeros(size, dtype=torch.uint8).numpy() for size in sizes)  # aligned
    source = rows.numpy() if rows.dtype == torch.float32 else rows.view(torch.uint16).numpy()
    assert native.pack(format.kind, format.group, [source], data, scales, native.Pool(1)) is None
    return native.Weight(format.kind, format.group, n, k, data, scales).unpack(choose_isa())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_inputs", [64, 128, 320, 104])
@pytest.mark.parametrize("format", [INT8, INT4], ids=["int8", "int4"])
def test_numbers_are_those_of_the_cpu(
    format: GpuFormat, num_inputs: int, dtype: torch.dtype
) -> None:
    rows = rows_of(50, num_inputs).to(dtype)
    matrix = empty(format, *rows.shape)
    put_rows(rows, matrix, 0)
    assert np.array_equal(widened_matrix(matrix).numpy(), packed_on_the_cpu(format, rows))
    assert torch.equal(matrix.scales, matrix.scales.bfloat16().float())


@pytest.mark.parametrize("format", [INT8, INT4, FP8], ids=["int8", "int4", "fp8"])
def test_rows_may_come_in_parts(format: GpuFormat) -> None:
    rows = rows_of(50, 200)
    whole, parts = empty(format, 50, 200), empty(format, 50, 200)
    put_rows(rows, whole, 0)
    for start, end in ((20, 37), (0, 20), (37, 50)):
        put_rows(rows[start:end], parts, start)
    assert torch.equal(whole.data.view(torch.uint8), parts.data.view(torch.uint8))
    assert torch.equal(whole.scales, parts.scales)


def test_what_is_not_quantized_is_copied() -> None:
    rows = torch.randn(3, 10).half()
    matrix = Matrix(GpuFormat("float16"), (5, 10), torch.zeros(5, 10).half())
    put_rows(rows, matrix, 2)
    assert torch.equal(matrix.data, torch.cat((torch.zeros(2, 10).half(), rows)))


def test_e4m3_loses_a_sixteenth_at_most() -> None:
    rows = rows_of(50, 200)
    matrix = empty(FP8, 50, 200)
    put_rows(rows, matrix, 0)
    error, largest = (widened_matrix(matrix) - rows).abs(), rows.abs().amax(1, keepdim=True)
    # half of a last bit of 4; below 2^-6 e4m3 has steps of 2^-9, of a scale that makes 448 largest
    assert (error <= torch.maximum(rows.abs() / 16, largest / 448 * 2**-10) * 1.001 + 1e-30).all()
    kept = matrix.data.float().abs().amax(1)
    assert torch.equal(kept[2:], torch.full((48,), 448.0))
    assert not kept[:2].any()
    assert not matrix.scales[:2].any()
