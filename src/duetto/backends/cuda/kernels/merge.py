"""The sums of splits, merged in order: what attention keeps of a split, and the kernel that merges.

A split of a row is its largest exponent, the sum of its powers, and the sum of values times powers.
A split that a row does not see has -inf, 0 and zeros, and leaves the row's sums as they are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.attention_launch import HeadShape
from duetto.backends.cuda.kernels.query_tiles import keys_of_tile, rows_of_tile
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.sizes import FEW_ROWS, SPLIT, num_splits
from duetto.backends.cuda.tensors import QueryTiles, StepTensors

_PART = 64  # numbers of a head that a program merges
_AT_A_TIME = 8  # splits that are on their way: their loads depend on nothing
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


class Partials(NamedTuple):
    """Room for the sums of splits, fp32: those of packed row p of KV head h, in split s, at
    (p * num_kv_heads + h) * max_splits + s."""

    maxima: Tensor  # [num_rows * num_heads * max_splits]
    sums: Tensor  # the same
    outputs: Tensor  # [... * head_dim]
    max_splits: int


def allocate_partials(
    num_rows: int, num_heads: int, head_dim: int, max_model_len: int, device: torch.device | str
) -> Partials:
    splits = num_splits(max_model_len)
    count = num_rows * num_heads * splits
    maxima, sums = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    outputs = torch.empty(count * head_dim, dtype=torch.float32, device=device)
    return Partials(maxima, sums, outputs, splits)


@triton.jit
def add_split(top, total, summed, split_top, split_total, split_summed):
    """The sums of a row's first splits, and one more: largest exponent, powers, values."""
    new = tl.maximum(top, split_top)
    safe = tl.where(new == float("-inf"), 0.0, new)
    ours, its = tl.exp2(top - safe), tl.exp2(split_top - safe)
    total = tl.fma(split_total, its, total * ours)
    weights = tl.broadcast_to(its[:, None], split_summed.shape)
    return new, total, tl.fma(split_summed, weights, summed * ours[:, None])


@triton.jit
def _merge_splits(
    maxima, sums, outputs, out, out_stride, query_starts, context_lens, runs, tiles, first_rows,
    max_splits, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    PART: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, place = tl.program_id(0), tl.program_id(1)
    dim = tl.program_id(2) * PART + tl.arange(0, PART)
    _, first_query, token, head, _, is_live = rows_of_tile(
        place, runs, tiles, query_starts, context_lens, ROWS, GROUP
    )
    start, end, _, _ = keys_of_tile(
        place, runs, tiles, query_starts, context_lens, ROWS, GROUP, WINDOW
    )
    row = tl.load(first_rows + place) + tl.arange(0, ROWS)
    base = (row * KV_HEADS + kv_head).to(tl.int64) * max_splits
    is_number = is_live[:, None] & (dim < DIM)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, PART], tl.float32)
    last = tl.cdiv(end, SPLIT)
    for first in range(start // SPLIT, last, AT_A_TIME):
        for ahead in tl.static_range(AT_A_TIME):
            split = first + ahead
            is_there = is_live & (split < last)
            split_top = tl.load(maxima + base + split, mask=is_there, other=float("-inf"))
            split_total = tl.load(sums + base + split, mask=is_there, other=0.0)
            places = outputs + (base + split)[:, None] * DIM + dim[None, :]
            split_summed = tl.load(places, mask=is_number & (split < last), other=0.0)
            top, total, summed = add_split(top, total, summed, split_top, split_total, split_summed)
    column = (kv_head * GROUP + head) * DIM
    places = out + ((first_query + token).to(tl.int64) * out_stride + column)[:, None]
    total = tl.where(is_live, total, 1.0)
    result = tl.div_rn(summed, tl.broadcast_to(total[:, None], summed.shape))
    tl.store(places + dim[None, :], result.to(out.dtype.element_ty), mask=is_number)


def merge_splits(
    partials: Partials,
    out: Tensor,
    step: StepTensors,
    tiles: QueryTiles,
    shape: HeadShape,
) -> None:
    """Of all rows of `tiles`."""
    assert tiles.first_rows is not None
    grid = (shape.num_kv_heads, len(tiles.runs), -(-shape.head_dim // _part(shape)))
    _merge_splits[grid](
        partials.maxima,
        partials.sums,
        partials.outputs,
        out,
        out.stride(0),
        step.query_starts,
        step.context_lens,
        tiles.runs,
        tiles.tiles,
        tiles.first_rows,
        partials.max_splits,
        **_constexprs(shape, tiles.rows_per_tile),
        **_OPTIONS,
    )


def _constexprs(shape: HeadShape, rows: int) -> dict[str, object]:
    return {
        "HEADS": shape.num_heads,
        "KV_HEADS": shape.num_kv_heads,
        "DIM": shape.head_dim,
        "PART": _part(shape),
        "WINDOW": shape.window or 0,
        "SPLIT": SPLIT,
        "ROWS": rows,
        "AT_A_TIME": _AT_A_TIME,
    }


def _part(shape: HeadShape) -> int:
    return min(int(triton.next_power_of_2(shape.head_dim)), _PART)


def variants() -> Iterator[KernelVariant]:
    """Of 8B models' heads, and of the widest."""
    numbers = ("query_starts", "context_lens", "runs", "tiles", "first_rows")
    signature = {
        **dict.fromkeys(("maxima", "sums", "outputs"), "*fp32"),
        "out": "*bf16",
        **dict.fromkeys(numbers, "*i32"),
        **dict.fromkeys(("out_stride", "max_splits"), "i32"),
    }
    for head_dim in (128, 256):
        constexprs = _constexprs(HeadShape(32, 8, head_dim, None), FEW_ROWS)
        name = f"bf16, {head_dim} wide"
        yield KernelVariant(name, _merge_splits, signature, constexprs, _OPTIONS, ("out_stride",))
