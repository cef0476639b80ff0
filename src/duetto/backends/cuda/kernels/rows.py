"""Small work on rows: rows that are selected, and logits that are soft-capped."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.variant import KernelVariant

_COLUMNS = 1024  # of a program


@triton.jit
def _select_rows(x, rows, out, x_stride, out_stride, W, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < W
    source = tl.load(rows + row).to(tl.int64)
    values = tl.load(x + source * x_stride + column, mask=mask)
    tl.store(out + row.to(tl.int64) * out_stride + column, values, mask=mask)


@triton.jit
def _soft_cap(x, stride, cap, W, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = x + tl.program_id(0).to(tl.int64) * stride + column
    scaled = tl.load(at, mask=column < W, other=0.0).to(tl.float32) / cap
    # tanh by its exponential, of the magnitude, which cannot overflow
    e = tl.exp(-2.0 * tl.abs(scaled))
    tanh = (1.0 - e) / (1.0 + e)
    capped = tl.where(scaled < 0.0, -tanh, tanh) * cap
    tl.store(at, capped.to(x.dtype.element_ty), mask=column < W)


def launch_select_rows(x: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[i] = x[rows[i]], of the first len(out) of `rows`."""
    width = out.shape[1]
    _select_rows[(len(out), triton.cdiv(width, _COLUMNS))](
        x, rows, out, x.stride(0), out.stride(0), width, COLUMNS=_COLUMNS, num_warps=4
    )


def select_rows_twin(x: Tensor, rows: Tensor, out: Tensor) -> None:
    out.copy_(x[rows[: len(out)].long()])


def launch_soft_cap(x: Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap), in place."""
    width = x.shape[1]
    _soft_cap[(len(x), triton.cdiv(width, _COLUMNS))](
        x, x.stride(0), cap, width, COLUMNS=_COLUMNS, num_warps=4
    )


def soft_cap_twin(x: Tensor, cap: float) -> None:
    x.copy_(torch.tanh(x.float() / cap) * cap)


def variants() -> Iterator[KernelVariant]:
    """Of 4,096 columns, and of a vocabulary."""
    signature = {"x": "*bf16", "rows": "*i32", "out": "*bf16"}
    signature |= {"x_stride": "i32", "out_stride": "i32", "W": "i32"}
    constants, options = {"COLUMNS": _COLUMNS}, {"num_warps": 4}
    yield KernelVariant("select_rows", _select_rows, signature, constants, options)
    signature = {"x": "*fp32", "stride": "i32", "cap": "fp32", "W": "i32"}
    yield KernelVariant("soft_cap", _soft_cap, signature, constants, options)
