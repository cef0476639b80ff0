"""Projections: every format against its twin, bits that no company changes, fused as in parts."""

import pytest
import torch
from torch import Tensor

from duetto.backends.cuda.formats import GpuFormat, GpuFormatName
from duetto.backends.cuda.kernels.activations import activate_twin
from duetto.backends.cuda.kernels.linear import (
    launch_linear,
    linear_by,
    linear_twin,
    widened_matrix,
)
from duetto.backends.cuda.tensors import Matrix
from duetto.backends.cuda.tiles import LinearTile

DTYPES = (torch.float16, torch.float32)
QUANTIZED: tuple[GpuFormatName, ...] = ("int8", "int4", "fp8")


def matrix_of(kind: GpuFormatName, num_outputs: int, num_inputs: int) -> Matrix:
    """Random numbers of about 1 / sqrt(num_inputs) in a format, not quantized from anything."""
    shape, size = (num_outputs, num_inputs), num_inputs**-0.5
    if kind in ("float16", "float32"):
        data = (torch.randn(shape) * size).to(getattr(torch, kind))
        return Matrix(GpuFormat(kind), shape, data)
    if kind == "fp8":
        data = torch.randn(shape).to(torch.float8_e4m3fn)
        return Matrix(GpuFormat("fp8"), shape, data, torch.rand(num_outputs) * size)
    group, largest = (128, 127) if kind == "int8" else (64, 8)
    groups = -(-num_inputs // group)
    scales = (torch.rand(groups, num_outputs) * size * 2 / largest).t()
    if kind == "int8":
        data = torch.randint(-127, 128, shape, dtype=torch.int8)
    else:
        data = torch.randint(0, 256, (num_outputs, groups * group // 2), dtype=torch.uint8)
    return Matrix(GpuFormat(kind, group), shape, data, scales)


def plain(dtype: torch.dtype) -> GpuFormatName:
    return str(dtype).removeprefix("torch.")  # type: ignore[return-value]


def kinds(dtype: torch.dtype) -> tuple[GpuFormatName, ...]:
    return (plain(dtype), *QUANTIZED)


def assert_near(out: Tensor, wanted: Tensor, slack: float = 1e-5) -> None:
    """Sums in another order differ by some units of fp32; rounded, by one unit of out's dtype."""
    unit = torch.finfo(out.dtype).eps
    error = (out.float() - wanted.float()).abs()
    assert (error <= wanted.float().abs() * unit + slack).all(), error.max()


@pytest.mark.parametrize("kind", ["plain", *QUANTIZED])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs"),
    [(1, 16, 64), (19, 111, 111), (1, 111, 500), (19, 16, 1024), (99, 64, 256), (19, 500, 128)],
)
def test_it_is_its_twin(
    kind: GpuFormatName, num_rows: int, num_outputs: int, num_inputs: int
) -> None:
    torch.manual_seed(1)
    for dtype in DTYPES:
        matrix = matrix_of(kind if kind in QUANTIZED else plain(dtype), num_outputs, num_inputs)
        x = torch.randn(num_rows, num_inputs).to(dtype)
        out, wanted = torch.full((2, num_rows, num_outputs), 7.0, dtype=dtype)
        launch_linear(x, matrix, out)
        linear_twin(x, matrix, wanted)
        assert_near(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_accumulation_and_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    for kind in kinds(dtype):
        matrix, bias = matrix_of(kind, 111, 200), torch.randn(111)
        x = torch.randn(19, 300).to(dtype)[:, 50:250]
        for accumulate in (False, True):
            for own in (None, bias):
                before = torch.randn(19, 200).to(dtype)
                out, wanted = before.clone(), before.clone()
                launch_linear(x, matrix, out[:, 7:118], bias=own, accumulate=accumulate)
                linear_twin(x, matrix, wanted[:, 7:118], bias=own, accumulate=accumulate)
                assert_near(out, wanted)
                assert torch.equal(out[:, :7], before[:, :7])  # nothing beside it is written
                assert torch.equal(out[:, 118:], before[:, 118:])


def test_logits_are_in_fp32() -> None:
    torch.manual_seed(3)
    matrix, x = matrix_of("float16", 111, 96), torch.randn(3, 96).half()
    out, wanted = torch.empty(2, 3, 111)
    launch_linear(x, matrix, out)
    linear_twin(x, matrix, wanted)
    assert_near(out, wanted)
    assert not torch.equal(out, out.half().float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    for kind in kinds(dtype):
        matrix, x = matrix_of(kind, 60, 300), torch.randn(40, 300).to(dtype)
        whole = torch.empty(40, 60, dtype=dtype)
        launch_linear(x, matrix, whole)
        for rows in (slice(0, 1), slice(7, 8), slice(3, 22), slice(39, 40)):
            out = torch.empty_like(whole[rows])
            launch_linear(x[rows], matrix, out)
            assert torch.equal(out, whole[rows]), (kind, rows)


@pytest.mark.parametrize("kind", ["float16", *QUANTIZED])
def test_a_row_has_the_same_bits_by_any_tile(kind: GpuFormatName) -> None:
    """Outputs and tokens are cut otherwise; inputs only in another number of groups at a time."""
    torch.manual_seed(8)
    matrix, x = matrix_of(kind, 2 * 70, 300), torch.randn(33, 300).half()
    inputs = (256, 128) if kind in ("int8", "int4") else (128,)
    for gate in (None, "silu"):
        whole = torch.empty(33, 140 if gate is None else 70).half()
        launch_linear(x, matrix, whole, gate=gate)
        for outputs, tokens in ((64, 64), (128, 32)):
            for at_once in inputs:
                out, tile = torch.empty_like(whole), LinearTile(outputs, tokens, at_once, 4, 2)
                linear_by(tile, x, matrix, out, gate=gate)
                assert torch.equal(out, whole), tile


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_a_product_that_is_rounded_then_added(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    for kind in kinds(dtype):
        matrix, bias = matrix_of(kind, 80, 200), torch.randn(80)
        x, before = torch.randn(19, 200).to(dtype), torch.randn(19, 80).to(dtype)
        product, total = torch.empty_like(before), before.clone()
        launch_linear(x, matrix, product, bias=bias)
        launch_linear(x, matrix, total, bias=bias, accumulate=True)
        assert torch.equal(total, before + product)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_opened(dtype: torch.dtype, gate: str) -> None:
    torch.manual_seed(6)
    for kind in kinds(dtype):
        matrix, x = matrix_of(kind, 2 * 80, 200), torch.randn(19, 200).to(dtype)
        out, wanted = torch.empty(2, 19, 80, dtype=dtype)
        both = torch.empty(19, 160, dtype=dtype)
        launch_linear(x, matrix, out, gate=gate)
        launch_linear(x, matrix, both)
        # from the products that the kernel itself rounds: exp differs by some units of fp32 only
        opened, up = both.float().chunk(2, dim=1)
        wanted.copy_(activate_twin(opened, gate) * up)
        assert_near(out, wanted, slack=5e-5)


def test_no_row_is_no_launch() -> None:
    out = torch.empty(0, 16)
    launch_linear(torch.empty(0, 32), matrix_of("float32", 16, 32), out)


def test_every_byte_of_e4m3_is_widened_exactly() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = numbers[torch.isfinite(numbers.float())]
    matrix = Matrix(GpuFormat("fp8"), (len(finite), 1), finite[:, None].clone(), torch.ones(254))
    for dtype in DTYPES:
        out = torch.empty(1, len(finite), dtype=dtype)
        launch_linear(torch.ones(1, 1, dtype=dtype), matrix, out)
        assert torch.equal(out[0].float(), finite.float())


def test_every_nibble_is_widened_exactly() -> None:
    """Number j of a group is the low half of byte j, number j + 32 the high one."""
    data = torch.randint(0, 256, (16, 64), dtype=torch.uint8)
    matrix = Matrix(GpuFormat("int4", 64), (16, 100), data, torch.ones(16, 2))
    out = torch.empty(100, 16)
    launch_linear(torch.eye(100), matrix, out)
    groups = [(data[:, 32 * g : 32 * g + 32] >> s & 15) for g in (0, 1) for s in (0, 4)]
    wanted = torch.cat(groups, dim=1).float() - 8
    assert torch.equal(out.t(), wanted[:, :100])
    assert torch.equal(widened_matrix(matrix), wanted[:, :100])
