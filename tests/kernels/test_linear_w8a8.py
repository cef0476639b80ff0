"""Products of int8 by int8, and the rows that they are of: equal to their twins, bit for bit."""

import pytest
import torch
from torch import Tensor

from duetto.backends.cuda.formats import GpuFormat
from duetto.backends.cuda.kernels.linear_w8a8 import launch_linear_w8a8, linear_w8a8_twin
from duetto.backends.cuda.kernels.quantize_rows import launch_quantize_rows, quantize_rows_twin
from duetto.backends.cuda.tensors import Matrix


def places(num_rows: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    numbers = torch.full((num_rows, num_inputs + 3), 99, dtype=torch.int8)[:, :num_inputs]
    return numbers, torch.full((num_rows, -(-num_inputs // 128)), 99.0)


def matrix_of(num_outputs: int, num_inputs: int) -> Matrix:
    shape = (num_outputs, num_inputs)
    scales = (torch.rand(-(-num_inputs // 128), num_outputs) / 1000).t()
    data = torch.randint(-127, 128, shape, dtype=torch.int8)
    return Matrix(GpuFormat("int8", 128), shape, data, scales)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    found = places(*x.shape)
    quantize_rows_twin(x, *found)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("num_rows", "num_inputs"), [(1, 64), (19, 111), (3, 1300), (99, 128)])
def test_rows_are_quantized_as_the_twin_does(
    num_rows: int, num_inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    x = (torch.randn(num_rows, 2 * num_inputs) * 3).to(dtype)[:, num_inputs:]
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5])  # ties go to the even one
    out, wanted = places(num_rows, num_inputs), places(num_rows, num_inputs)
    launch_quantize_rows(x, *out)
    quantize_rows_twin(x, *wanted)
    assert torch.equal(out[0], wanted[0])
    assert torch.equal(out[1], wanted[1])
    assert out[0][0, :5].tolist() == [127, 0, 2, 2, 0]


def test_rows_that_are_zero_tiny_or_no_numbers() -> None:
    x = torch.zeros(6, 256)
    x[1], x[2, 7], x[3, 7], x[4, 7], x[5] = 1e-31, torch.nan, torch.inf, -torch.inf, 1e-29
    numbers, scales = places(6, 256)
    launch_quantize_rows(x, numbers, scales)
    assert not numbers[:5].any()
    assert not scales[:2].any()
    assert torch.isnan(scales[2:5, 0]).all()
    assert not scales[2:5, 1].any()  # the row's other group has its own
    assert (numbers[5] == 127).all()
    assert torch.allclose(scales[5] * 127, torch.tensor(1e-29), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs"),
    [(1, 16, 64), (19, 111, 111), (1, 111, 500), (19, 64, 1024), (99, 16, 128)],
)
def test_it_is_its_twin_bit_for_bit(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    matrix, bias = matrix_of(num_outputs, num_inputs), torch.randn(num_outputs)
    x = quantized(torch.randn(num_rows, num_inputs))
    before = torch.randn(num_rows, num_outputs).to(dtype)
    for own in (None, bias):
        for accumulate in (False, True):
            out, wanted = before.clone(), before.clone()
            launch_linear_w8a8(*x, matrix, out, bias=own, accumulate=accumulate)
            linear_w8a8_twin(*x, matrix, wanted, bias=own, accumulate=accumulate)
            assert torch.equal(out, wanted)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_a_gate_is_opened(gate: str) -> None:
    torch.manual_seed(3)
    matrix, x = matrix_of(2 * 80, 300), quantized(torch.randn(19, 300))
    out, wanted = torch.empty(2, 19, 80)
    launch_linear_w8a8(*x, matrix, out, gate=gate)
    linear_w8a8_twin(*x, matrix, wanted, gate=gate)
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-5)  # exp differs by units of fp32


def test_a_row_that_is_no_number_is_alone() -> None:
    x = torch.randn(3, 256)
    x[1, 200] = torch.nan
    numbers, scales = quantized(x)
    out = torch.empty(3, 16)
    launch_linear_w8a8(numbers, scales, matrix_of(16, 256), out)
    assert torch.isnan(out[1]).all()
    assert torch.isfinite(out[[0, 2]]).all()


def test_no_row_is_no_launch() -> None:
    numbers, scales = places(0, 128)
    launch_quantize_rows(torch.empty(0, 128), numbers, scales)
    launch_linear_w8a8(numbers, scales, matrix_of(16, 128), torch.empty(0, 16))
