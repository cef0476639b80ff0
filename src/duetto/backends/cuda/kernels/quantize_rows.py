"""Rows of activations to int8, a scale per row and group of 128: as the CPU does it before it
multiplies by quantized weights (csrc/kernels/linear_rows.h), number for number."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.variant import KernelVariant

ROW_GROUP = 128
_GROUPS = 8  # of a row that a program quantizes
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Adding it rounds a number below 2^22 to a whole one, ties to even.
_SHIFT = tl.constexpr(12582912.0)
_TINY = tl.constexpr(1e-30)  # below, 127 / largest may be infinite: zero


@triton.jit
def quantize_rows_kernel(
    x, numbers, scales, num_inputs, x_stride, numbers_stride, scales_stride,
    GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (t, b): GROUPS groups of row t. A group with a NaN or an infinity has the scale NaN,
    so that its row, and no other, becomes NaN."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_inside = columns < num_inputs
    group = tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    sizes = tl.abs(group).to(tl.int32, bitcast=True)  # in the order of the numbers; NaN is largest
    largest = tl.max(sizes, 1)
    is_finite = largest < 0x7F800000
    largest = tl.where(is_finite, largest, 0).to(tl.float32, bitcast=True)
    is_some = largest >= _TINY
    divisor = tl.where(is_some, largest, 1.0)
    inverse = tl.where(is_some, tl.div_rn(127.0, divisor), 0.0)
    scale = tl.where(is_some, tl.div_rn(divisor, 127.0), 0.0)
    scale = tl.where(is_finite, scale, float("nan"))
    group = tl.where(is_finite[:, None], group, 0.0)
    whole = (group * inverse[:, None] + _SHIFT) - _SHIFT
    tl.store(numbers + row * numbers_stride + columns, whole.to(tl.int8), mask=is_inside)
    tl.store(scales + row * scales_stride + groups, scale, mask=groups * GROUP < num_inputs)


def launch_quantize_rows(x: Tensor, numbers: Tensor, scales: Tensor) -> None:
    """numbers [T, K] int8 and scales [T, ceil(K / 128)] fp32 of x [T, K]."""
    num_rows, num_inputs = x.shape
    if num_rows == 0:
        return
    quantize_rows_kernel[(num_rows, triton.cdiv(num_inputs, _GROUPS * ROW_GROUP))](
        x,
        numbers,
        scales,
        num_inputs,
        x.stride(0),
        numbers.stride(0),
        scales.stride(0),
        GROUPS=_GROUPS,
        GROUP=ROW_GROUP,
        **_OPTIONS,
    )


def quantize_rows_twin(x: Tensor, numbers: Tensor, scales: Tensor) -> None:
    missing = -x.shape[1] % ROW_GROUP
    groups = torch.nn.functional.pad(x.float(), (0, missing)).unflatten(1, (-1, ROW_GROUP))
    largest = groups.abs().amax(-1)
    is_some = largest >= _TINY.value
    inverse = torch.where(is_some, torch.full_like(largest, 127.0) / largest, 0.0)
    whole = (groups * inverse[..., None]).round()
    is_finite = torch.isfinite(largest)
    own = torch.where(is_some, largest / torch.full_like(largest, 127.0), 0.0)
    scales.copy_(torch.where(is_finite, own, torch.nan))
    whole = torch.where(is_finite[..., None], whole, 0.0)
    numbers.copy_(whole.flatten(1)[:, : x.shape[1]])


def variants() -> Iterator[KernelVariant]:
    sizes = ("num_inputs", "x_stride", "numbers_stride")
    signature = {"x": "*bf16", "numbers": "*i8", "scales": "*fp32"}
    signature |= dict.fromkeys((*sizes, "scales_stride"), "i32")
    constants = {"GROUPS": _GROUPS, "GROUP": ROW_GROUP}
    yield KernelVariant("bf16", quantize_rows_kernel, signature, constants, _OPTIONS, sizes)
