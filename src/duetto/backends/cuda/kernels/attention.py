"""Paged attention: rows of queries against their own run's keys and values.

Queries are the M side of both products. Keys come KEY_BLOCK at a time, at absolute positions; the
sums of SPLIT positions, at absolute positions too, are merged in order. So a row's bits depend
neither on its chunk nor on its tile, nor on whether one program walks its splits (`many`) or
several share them out (`few`; merge.py then merges). Two things keep it so: a block that a row
does not see leaves its sums as they are, and multiplications are fused with additions only where
it says so (tl.fma): a compiler would fuse them in masked and unmasked blocks differently.

Powers are of 2. Under a soft-cap scores are tanh(product * scale / cap), as 1 - 2 / (1 + e^2x),
and `outer` has the cap; otherwise they are products, and `outer` has the scale. int8 and fp8 are
widened exactly: a key's scale is multiplied into its score, a value's into its power. What a row
does not see of a block is its own run's, or zeros.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.arena import kv_numbers
from duetto.backends.cuda.kernels.attention_launch import (
    Exponents,
    HeadShape,
    exponents,
    launch_of,
    many_rows,
    num_shares,
)
from duetto.backends.cuda.kernels.merge import Partials, add_split, merge_splits
from duetto.backends.cuda.kernels.query_tiles import (
    as_read,
    keys_of_tile,
    load_part,
    load_queries,
    load_scales,
    rows_of_tile,
    scores_of_block,
    slots_of,
    widened_kv,
)
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.sizes import FEW_ROWS, KEY_BLOCK, SPLIT
from duetto.backends.cuda.tensors import LayerKV, QueryTiles, StepTensors


@triton.jit
def _add_block(
    top, total, summed, queries, query_positions, keys, values, key_scales, value_scales, table,
    first_key, start, end, kv_head, inner, outer, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    FP8: tl.constexpr, KEY_BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sums of rows with KEY_BLOCK keys more. Unmasked where every row sees all of them."""
    position = first_key + tl.arange(0, KEY_BLOCK)
    is_inside = position < end
    if WINDOW:
        is_inside = is_inside & (position >= start)
    slots = slots_of(table, position, is_inside, BLOCK_SIZE, MASKED)
    scores = scores_of_block(
        *(queries, query_positions, keys, key_scales, slots, position, is_inside, kv_head, inner),
        *(KV_HEADS, DIM, PADDED, WINDOW, CAPPED, FP8, MASKED),
    )
    new = tl.maximum(top, tl.max(scores, 1) * outer)
    if MASKED:
        safe = tl.where(new == float("-inf"), 0.0, new)
    else:
        safe = new
    powers = tl.exp2(tl.fma(scores, outer, -safe[:, None]))
    ours = tl.exp2(top - safe)
    dim = tl.arange(0, PADDED)
    places = values + (slots[:, None] * KV_HEADS + kv_head) * DIM + dim[None, :]
    block = load_part(places, is_inside[:, None], (dim < DIM)[None, :], MASKED, DIM != PADDED)
    ones = tl.full([KEY_BLOCK, 16], 1.0, queries.dtype)
    parts = powers.to(queries.dtype)
    total = tl.dot(parts, ones, total * ours[:, None], input_precision="ieee")
    if value_scales is not None:
        scales = load_scales(value_scales, slots, kv_head, is_inside, KV_HEADS, FP8, MASKED)
        parts = (powers * scales[None, :]).to(queries.dtype)
    block = widened_kv(block, queries.dtype, FP8)
    summed = tl.dot(parts, block, summed * ours[:, None], input_precision="ieee")
    return new, total, summed


@triton.jit
def _sums_of_split(
    first, last, start, end, all_start, all_end, queries, query_positions, keys, values,
    key_scales, value_scales, table, kv_head, inner, outer, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, FP8: tl.constexpr, KEY_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the keys first ... last that a tile sees, in one split."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, 16], tl.float32)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    begin = tl.maximum(first, start // KEY_BLOCK * KEY_BLOCK)
    stop = tl.minimum(last, end)
    full = begin
    if WINDOW:
        full = tl.maximum(begin, tl.cdiv(all_start, KEY_BLOCK) * KEY_BLOCK)
        full = tl.minimum(full, tl.cdiv(stop, KEY_BLOCK) * KEY_BLOCK)
        for key in range(begin, full, KEY_BLOCK):
            top, total, summed = _add_block(
                *(top, total, summed, queries, query_positions, keys, values),
                *(key_scales, value_scales, table, key, start, end, kv_head, inner, outer),
                *(KV_HEADS, DIM, PADDED, BLOCK_SIZE, WINDOW, CAPPED, FP8, KEY_BLOCK, True),
            )
    rest = tl.maximum(tl.minimum(stop, all_end) // KEY_BLOCK * KEY_BLOCK, full)
    for key in range(full, rest, KEY_BLOCK):
        top, total, summed = _add_block(
            *(top, total, summed, queries, query_positions, keys, values),
            *(key_scales, value_scales, table, key, start, end, kv_head, inner, outer),
            *(KV_HEADS, DIM, PADDED, BLOCK_SIZE, WINDOW, CAPPED, FP8, KEY_BLOCK, False),
        )
    for key in range(rest, stop, KEY_BLOCK):
        top, total, summed = _add_block(
            *(top, total, summed, queries, query_positions, keys, values),
            *(key_scales, value_scales, table, key, start, end, kv_head, inner, outer),
            *(KV_HEADS, DIM, PADDED, BLOCK_SIZE, WINDOW, CAPPED, FP8, KEY_BLOCK, True),
        )
    column = tl.arange(0, 16)[None, :]  # all are the same; one is taken
    return top, tl.sum(tl.where(column == 0, total, 0.0), 1), summed


@triton.jit
def _attend(
    q, q_stride, out, out_stride, keys, values, key_scales, value_scales, query_starts,
    context_lens, block_tables, table_width, runs, tiles, first_rows, maxima, sums, outputs,
    max_splits, inner, outer, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    FP8: tl.constexpr, SPLIT: tl.constexpr, KEY_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """One tile of one KV head. OWN: every num_programs(2)th of its splits, for _merge_splits."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, place = tl.program_id(0), tl.program_id(1)
    start, end, all_start, all_end = keys_of_tile(
        place, runs, tiles, query_starts, context_lens, ROWS, GROUP, WINDOW
    )
    split = start // SPLIT + tl.program_id(2)
    if split * SPLIT >= end:
        return
    run, first_query, token, head, position, is_live = rows_of_tile(
        place, runs, tiles, query_starts, context_lens, ROWS, GROUP
    )
    table = block_tables + run.to(tl.int64) * tl.load(table_width)
    column = (kv_head * GROUP + head) * DIM
    query = (first_query + token).to(tl.int64)
    queries = load_queries(q, query * q_stride + column, is_live, DIM, PADDED)
    dim = tl.arange(0, PADDED)
    is_number = is_live[:, None] & (dim < DIM)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    shares = tl.num_programs(2) if OWN else 1
    for own in range(split, tl.cdiv(end, SPLIT), shares):
        split_top, split_total, split_summed = _sums_of_split(
            *(own * SPLIT, (own + 1) * SPLIT, start, end, all_start, all_end, queries, position),
            *(keys, values, key_scales, value_scales, table, kv_head, inner, outer),
            *(KV_HEADS, DIM, PADDED, BLOCK_SIZE, WINDOW, CAPPED, FP8, KEY_BLOCK, ROWS),
        )
        if OWN:
            row = tl.load(first_rows + place) + tl.arange(0, ROWS)
            base = (row * KV_HEADS + kv_head).to(tl.int64) * max_splits + own
            tl.store(maxima + base, split_top, mask=is_live)
            tl.store(sums + base, split_total, mask=is_live)
            places = outputs + base[:, None] * DIM + dim[None, :]
            tl.store(places, split_summed, mask=is_number)
        else:
            top, total, summed = add_split(
                *(top, total, summed, split_top, split_total, split_summed)
            )
    if not OWN:
        # Found anew, not kept through the loops, where registers are short: the compiler does not
        # know that program_id(2) is 0 here.
        again = place + tl.program_id(2)
        _, first_query, token, head, _, is_live = rows_of_tile(
            again, runs, tiles, query_starts, context_lens, ROWS, GROUP
        )
        query = (first_query + token).to(tl.int64)
        column = (kv_head * GROUP + head) * DIM
        is_number = is_live[:, None] & (dim < DIM)[None, :]
        places = out + (query * out_stride + column)[:, None] + dim[None, :]
        total = tl.where(is_live, total, 1.0)
        result = tl.div_rn(summed, tl.broadcast_to(total[:, None], summed.shape))
        tl.store(places, result.to(out.dtype.element_ty), mask=is_number)


def attend(
    q: Tensor,
    out: Tensor,
    kv: LayerKV,
    step: StepTensors,
    partials: Partials,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """q and out: [T, at least num_heads * head_dim], whose numbers of a row lie side by side."""
    assert q.stride(1) == out.stride(1) == 1
    shape = HeadShape(num_heads, num_kv_heads, head_dim, window)
    powers = exponents(scale, softcap)
    for tiles, is_few in ((step.few, True), (step.many, False)):
        if tiles is not None:
            _launch(q, out, kv, step, partials, tiles, shape, block_size, powers, is_few)
    if step.few is not None:
        merge_splits(partials, out, step, step.few, shape)


def _launch(
    q: Tensor,
    out: Tensor,
    kv: LayerKV,
    step: StepTensors,
    partials: Partials,
    tiles: QueryTiles,
    shape: HeadShape,
    block_size: int,
    powers: Exponents,
    is_few: bool,
) -> None:
    num_tiles = len(tiles.runs)
    shares = num_shares(num_tiles, shape.num_kv_heads, partials.max_splits) if is_few else 1
    launch = launch_of(tiles.rows_per_tile, shape.head_dim)
    _attend[(shape.num_kv_heads, num_tiles, shares)](
        *(q, q.stride(0), out, out.stride(0), *as_read(kv)),
        *(step.query_starts, step.context_lens, step.block_tables, step.table_width),
        *(tiles.runs, tiles.tiles, tiles.first_rows),
        *(partials.maxima, partials.sums, partials.outputs, partials.max_splits),
        *(powers.inner, powers.outer),
        HEADS=shape.num_heads,
        KV_HEADS=shape.num_kv_heads,
        DIM=shape.head_dim,
        PADDED=triton.next_power_of_2(shape.head_dim),
        BLOCK_SIZE=block_size,
        WINDOW=shape.window or 0,
        CAPPED=powers.inner != 0,
        FP8=kv.keys.dtype == torch.float8_e4m3fn,
        SPLIT=SPLIT,
        KEY_BLOCK=KEY_BLOCK,
        ROWS=tiles.rows_per_tile,
        OWN=is_few,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,
    )


def variants() -> Iterator[KernelVariant]:
    """Of the shapes of 8B models (32 heads, 8 of KV, 128 wide), and of some others."""
    yield from _of_rows("bf16", "bf16", "bf16", 128)
    yield from _of_rows("fp16", "fp16", "fp16", 128)
    yield from _of_rows("bf16, int8 KV", "bf16", "i8", 128)
    yield from _of_rows("bf16, fp8 KV", "bf16", "fp8", 128)
    yield from _of_rows("bf16, 64 wide", "bf16", "bf16", 64)
    yield from _of_rows("bf16, 80 wide", "bf16", "bf16", 80)
    yield from _of_rows("bf16, 256 wide, window, cap", "bf16", "bf16", 256, 4096, True)
    yield _variant("fp32, 16 rows", "fp32", "fp32", 128, 0, False, FEW_ROWS)


def _of_rows(
    name: str, dtype: str, kv_dtype: str, dim: int, window: int = 0, is_capped: bool = False
) -> Iterator[KernelVariant]:
    """Tiles of a few rows, and the longer ones of each compute capability."""
    for rows, capabilities in (
        (FEW_ROWS, ()),
        (many_rows(dim, torch.bfloat16, 90), (90,)),
        (many_rows(dim, torch.bfloat16, 80), (80, 120)),
    ):
        variant = _variant(f"{name}, {rows} rows", dtype, kv_dtype, dim, window, is_capped, rows)
        yield variant._replace(capabilities=capabilities)


def _variant(
    name: str, dtype: str, kv_dtype: str, dim: int, window: int, is_capped: bool, rows: int
) -> KernelVariant:
    is_few = rows == FEW_ROWS
    scales = {"key_scales": "*fp32", "value_scales": "*fp32"}
    is_scaled = kv_dtype in ("i8", "fp8")
    stored = "*i8" if is_scaled else f"*{kv_dtype}"
    numbers = ("query_starts", "context_lens", "block_tables", "table_width", "runs", "tiles")
    signature = {
        "q": f"*{dtype}",
        "out": f"*{dtype}",
        "keys": stored,
        "values": stored,
        **(scales if is_scaled else {}),
        **dict.fromkeys(numbers, "*i32"),
        **({"first_rows": "*i32"} if is_few else {}),
        **dict.fromkeys(("maxima", "sums", "outputs"), "*fp32"),
        **dict.fromkeys(("q_stride", "out_stride", "max_splits"), "i32"),
        **dict.fromkeys(("inner", "outer"), "fp32"),
    }
    constexprs = {
        **({} if is_scaled else dict.fromkeys(scales)),
        **({} if is_few else {"first_rows": None}),
        "HEADS": 32,
        "KV_HEADS": 8,
        "DIM": dim,
        "PADDED": triton.next_power_of_2(dim),
        "BLOCK_SIZE": 32,
        "WINDOW": window,
        "CAPPED": is_capped,
        "FP8": kv_dtype == "fp8",
        "SPLIT": SPLIT,
        "KEY_BLOCK": KEY_BLOCK,
        "ROWS": rows,
        "OWN": is_few,
    }
    launch = launch_of(rows, dim)
    options = {**launch._asdict(), "enable_fp_fusion": False}
    return KernelVariant(
        name,
        _attend,
        signature,
        constexprs,
        options,
        ("q_stride", "out_stride"),
    )


def attend_twin(
    q: Tensor,
    out: Tensor,
    kv: LayerKV,
    step: StepTensors,
    partials: Partials,  # noqa: ARG001  it shares nothing out
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """In fp32, query by query; powers are rounded before they are multiplied with values."""
    width = int(step.table_width)
    for run, context in enumerate(step.context_lens.tolist()):
        first, last = step.query_starts[run : run + 2].tolist()
        table = step.block_tables[run * width :]
        for row in range(first, last):
            end = context - (last - 1 - row)
            position = torch.arange(max(0, end - window) if window else 0, end, device=q.device)
            slots = table[position // block_size].long() * block_size + position % block_size
            heads = q[row, : num_heads * head_dim].float().view(num_kv_heads, -1, head_dim)
            keys, values = (t.permute(1, 0, 2) for t in kv_numbers(kv, slots))
            scores = heads @ keys.transpose(1, 2) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            powers = torch.exp(scores - scores.amax(-1, keepdim=True)).to(q.dtype).float()
            given = powers @ values / powers.sum(-1, keepdim=True)
            out[row, : num_heads * head_dim] = given.flatten().to(out.dtype)
