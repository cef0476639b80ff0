"""RMSNorm (Zhang and Sennrich, 2019) of rows or heads, and the additions around it.

    y      = norm(y) * (weight + offset)      if there is a `before`, rounded
    x      = x + y                            if there is a y, rounded
    out    = norm(x) * (weight + offset)      if there is an `after`

A row's sum of squares is added up by one program, in an order that its width alone decides.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.variant import KernelVariant


class Norm(NamedTuple):
    weight: Tensor | None  # [group] fp32
    eps: float
    group: int  # columns that are normed together
    offset: float


NO_NORM = Norm(None, 0.0, 1, 0.0)


@triton.jit
def _normed(x, weight, mask, W: tl.constexpr, eps, offset):
    """Rows [G, WP] in fp32, of which the first W columns count."""
    mean_square = tl.sum(x * x, 1) / W
    scale = tl.rsqrt(mean_square + eps)
    w = tl.load(weight + tl.arange(0, x.shape[1]), mask=mask, other=0.0)
    return x * scale[:, None] * (w + offset)[None, :]


@triton.jit
def _norm_heads(
    x, out, weight, x_stride, out_stride, eps, offset,
    HEADS: tl.constexpr, HP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """Row program_id(0): HEADS groups of W columns each."""
    t = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HP), tl.arange(0, WP)
    inside = column < W
    mask = (head < HEADS)[:, None] & inside[None, :]
    at = head[:, None] * W + column[None, :]
    row = tl.load(x + t * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    result = _normed(row, weight, inside, W, eps, offset)
    tl.store(out + t * out_stride + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm(
    x, y, out, before, after, x_stride, y_stride, out_stride,
    before_eps, before_offset, after_eps, after_offset,
    W: tl.constexpr, WP: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WP)
    inside = column < W
    at = column[None, :]
    mask = inside[None, :]
    added = tl.load(y + t * y_stride + at, mask=mask, other=0.0).to(tl.float32)
    if BEFORE:
        added = _normed(added, before, inside, W, before_eps, before_offset)
        added = added.to(y.dtype.element_ty).to(tl.float32)
    total = tl.load(x + t * x_stride + at, mask=mask, other=0.0).to(tl.float32) + added
    total = total.to(x.dtype.element_ty)
    tl.store(x + t * x_stride + at, total, mask=mask)
    if AFTER:
        result = _normed(total.to(tl.float32), after, inside, W, after_eps, after_offset)
        tl.store(out + t * out_stride + at, result.to(out.dtype.element_ty), mask=mask)


def _warps(width: int) -> int:
    return 8 if width >= 2048 else 4


def launch_rms_norm(x: Tensor, norm: Norm, out: Tensor) -> None:
    """x, out [T, width]; may be the same."""
    num_rows, width = x.shape
    heads = width // norm.group
    _norm_heads[(num_rows,)](
        x, out, norm.weight, x.stride(0), out.stride(0), norm.eps, norm.offset,
        HEADS=heads, HP=triton.next_power_of_2(heads),
        W=norm.group, WP=triton.next_power_of_2(norm.group), num_warps=_warps(width),
    )  # fmt: skip


def launch_add_norm(
    x: Tensor, y: Tensor, before: Norm | None, after: Norm | None, out: Tensor | None
) -> None:
    """x += norm(y); out = norm(x). y is not changed; out only where there is an `after`."""
    num_rows, width = x.shape
    first, last, to = before or NO_NORM, after or NO_NORM, x if out is None else out
    _add_norm[(num_rows,)](
        x, y, to, first.weight, last.weight, x.stride(0), y.stride(0), to.stride(0),
        first.eps, first.offset, last.eps, last.offset,
        W=width, WP=triton.next_power_of_2(width),
        BEFORE=before is not None, AFTER=after is not None, num_warps=_warps(width),
    )  # fmt: skip


def rms_norm_twin(x: Tensor, norm: Norm, out: Tensor) -> None:
    out.copy_(_twin_of_norm(x, norm))


def add_norm_twin(
    x: Tensor, y: Tensor, before: Norm | None, after: Norm | None, out: Tensor | None
) -> None:
    added = y if before is None else _twin_of_norm(y, before)
    x.copy_(x.float() + added.float())
    if after is not None and out is not None:
        out.copy_(_twin_of_norm(x, after))


def _twin_of_norm(x: Tensor, norm: Norm) -> Tensor:
    assert norm.weight is not None
    groups = x.float().reshape(len(x), -1, norm.group)
    mean_square = groups.pow(2).mean(-1, keepdim=True)
    result = groups * torch.rsqrt(mean_square + norm.eps) * (norm.weight + norm.offset)
    return result.reshape(x.shape).to(x.dtype)


def variants() -> Iterator[KernelVariant]:
    """Of a model with 4,096 columns, and of heads of 128."""
    number = {"eps": "fp32", "offset": "fp32"}
    pointers = {"x": "*bf16", "out": "*bf16", "weight": "*fp32"}
    strides = {"x_stride": "i32", "out_stride": "i32"}
    signature = pointers | strides | number
    for name, heads, width in (("rows", 1, 4096), ("heads", 32, 128)):
        shape = {"HEADS": heads, "HP": heads, "W": width, "WP": width}
        yield KernelVariant(f"rms_norm {name}", _norm_heads, signature, shape, {"num_warps": 8})
    names = ("before", "after")
    signature = {"x": "*bf16", "y": "*bf16", "out": "*bf16"} | dict.fromkeys(names, "*fp32")
    signature |= dict.fromkeys(("x_stride", "y_stride", "out_stride"), "i32")
    signature |= {f"{name}_{what}": "fp32" for name in names for what in ("eps", "offset")}
    shape = {"W": 4096, "WP": 4096, "BEFORE": True, "AFTER": True}
    yield KernelVariant("add_norm", _add_norm, signature, shape, {"num_warps": 8})
