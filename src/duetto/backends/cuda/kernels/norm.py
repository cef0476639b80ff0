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
from triton import knobs

from duetto.backends.cuda.kernels.variant import KernelVariant


class Norm(NamedTuple):
    weight: Tensor | None  # [group] fp32
    eps: float
    group: int  # columns that are normed together
    offset: float


NO_NORM = Norm(None, 0.0, 1, 0.0)


@triton.jit
def _normed(x, weight, inside, W: tl.constexpr, eps, offset):
    """Rows [rows, WP] in fp32, of which the first W columns count and the others are 0."""
    mean_square = tl.sum(x * x, 1) / W
    scale = tl.rsqrt(mean_square + eps)
    w = tl.load(weight + tl.arange(0, x.shape[1]), mask=inside, other=0.0)
    return x * scale[:, None] * (w + offset)[None, :]


@triton.jit(do_not_specialize=["num_groups"])
def _rms_norm(
    x, out, weight, x_stride, out_stride, eps, offset, num_groups,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """ROWS groups of W columns; each row of x has GROUPS."""
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, column = (group // GROUPS).to(tl.int64), tl.arange(0, WP)
    inside = column < W
    mask = (group < num_groups)[:, None] & inside[None, :]
    first = (group % GROUPS * W)[:, None] + column[None, :]
    numbers = tl.load(x + t[:, None] * x_stride + first, mask=mask, other=0.0).to(tl.float32)
    result = _normed(numbers, weight, inside, W, eps, offset)
    tl.store(out + t[:, None] * out_stride + first, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm(
    x, y, out, before, after, x_stride, y_stride, out_stride,
    before_eps, before_offset, after_eps, after_offset, num_rows,
    ROWS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, column = row.to(tl.int64)[:, None], tl.arange(0, WP)
    inside = column < W
    mask = (row < num_rows)[:, None] & inside[None, :]
    at = column[None, :]
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


def _rows(width: int) -> int:
    """That a program norms: several where they are short. A program costs the interpreter much."""
    if knobs.runtime.interpret:
        return 64
    rows: int = 1024 // triton.next_power_of_2(width)
    return max(1, rows)


def _warps(width: int) -> int:
    return 8 if width >= 2048 else 4


def launch_rms_norm(x: Tensor, norm: Norm, out: Tensor) -> None:
    """x, out [T, width]; may be the same."""
    num_rows, width = x.shape
    groups, rows = width // norm.group, _rows(norm.group)
    num_groups = num_rows * groups
    _rms_norm[(triton.cdiv(num_groups, rows),)](
        x, out, norm.weight, x.stride(0), out.stride(0), norm.eps, norm.offset, num_groups,
        GROUPS=groups, ROWS=rows, W=norm.group, WP=triton.next_power_of_2(norm.group),
        num_warps=_warps(norm.group),
    )  # fmt: skip


def launch_add_norm(
    x: Tensor, y: Tensor, before: Norm | None, after: Norm | None, out: Tensor | None
) -> None:
    """x += norm(y); out = norm(x). y is not changed; out only where there is an `after`."""
    num_rows, width = x.shape
    rows = _rows(width)
    first, last, to = before or NO_NORM, after or NO_NORM, x if out is None else out
    _add_norm[(triton.cdiv(num_rows, rows),)](
        x, y, to, first.weight, last.weight, x.stride(0), y.stride(0), to.stride(0),
        first.eps, first.offset, last.eps, last.offset, num_rows,
        ROWS=rows, W=width, WP=triton.next_power_of_2(width),
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
    """Of rows of 4,096 columns, and of heads of 128."""
    names = ("before", "after")
    signature = {"x": "*bf16", "out": "*bf16", "weight": "*fp32", "eps": "fp32", "offset": "fp32"}
    signature |= dict.fromkeys(("x_stride", "out_stride", "num_groups"), "i32")
    for name, groups, width in (("rows of 4096", 1, 4096), ("heads of 128", 32, 128)):
        shape = {"GROUPS": groups, "ROWS": max(1, 1024 // width), "W": width, "WP": width}
        options = {"num_warps": _warps(width)}
        yield KernelVariant(name, _rms_norm, signature, shape, options, ("x_stride", "out_stride"))
    signature = {"x": "*bf16", "y": "*bf16", "out": "*bf16"} | dict.fromkeys(names, "*fp32")
    strides = ("x_stride", "y_stride", "out_stride")
    signature |= dict.fromkeys((*strides, "num_rows"), "i32")
    signature |= {f"{name}_{what}": "fp32" for name in names for what in ("eps", "offset")}
    shape = {"ROWS": 1, "W": 4096, "WP": 4096, "BEFORE": True, "AFTER": True}
    yield KernelVariant("add", _add_norm, signature, shape, {"num_warps": 8}, strides)
