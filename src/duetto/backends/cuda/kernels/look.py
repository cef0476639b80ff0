"""How much attention some runs' tokens give to positions, beside a step (Backend.look_attention).

A program has a tile of packed rows, as attention has, and walks all blocks of keys twice: for the
largest exponent and the sum of powers, then for weights. Blocks stand at absolute positions, and
one that a row does not see leaves its sums as they are, so a token's weights depend on neither
chunk nor company. Each weight is rounded to whole units, and whole numbers are added up in any
order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.arena import kv_numbers
from duetto.backends.cuda.kernels.attention_launch import HeadShape, exponents
from duetto.backends.cuda.kernels.query_tiles import (
    as_read,
    keys_of_tile,
    load_queries,
    rows_of_tile,
    scores_of_block,
    slots_of,
)
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.sizes import FEW_ROWS, KEY_BLOCK
from duetto.backends.cuda.tensors import LayerKV, QueryTiles, StepTensors
from duetto.core.batch import ATTENTION_UNIT

_UNITS = 1 / ATTENTION_UNIT  # of a weight of 1; a power of two
_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}


@triton.jit
def _look(
    q, q_stride, keys, key_scales, query_starts, context_lens, block_tables, table_width,
    runs, tiles, units, end_of_units, inner, outer,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, FP8: tl.constexpr,
    KEY_BLOCK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, place = tl.program_id(0), tl.program_id(1)
    run, first_query, token, head, position, is_live = rows_of_tile(
        place, runs, tiles, query_starts, context_lens, ROWS, GROUP
    )
    start, end, _, _ = keys_of_tile(
        place, runs, tiles, query_starts, context_lens, ROWS, GROUP, WINDOW
    )
    table = block_tables + run.to(tl.int64) * tl.load(table_width)
    first = (first_query + token).to(tl.int64) * q_stride + (kv_head * GROUP + head) * DIM
    queries = load_queries(q, first, is_live, DIM, PADDED)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, 16], tl.float32)
    for key in range(start // KEY_BLOCK * KEY_BLOCK, end, KEY_BLOCK):
        scores, key_position, is_inside = _scores(
            key, start, end, queries, position, keys, key_scales, table, kv_head, inner,
            KV_HEADS, DIM, PADDED, BLOCK_SIZE, WINDOW, CAPPED, FP8, KEY_BLOCK,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(scores, 1) * outer)
        safe = tl.where(new == float("-inf"), 0.0, new)
        powers = tl.exp2(tl.fma(scores, outer, -safe[:, None]))
        total = total * tl.exp2(top - safe)[:, None]
        ones = tl.full([KEY_BLOCK, 16], 1.0, tl.float32)
        total = tl.dot(powers, ones, total, input_precision="ieee")
        top = new
    summed = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, total, 0.0), 1)
    # NaN where a score is, or is infinite: no comparison with it holds.
    is_lost = is_live & ((summed > 0) & (summed < float("inf")) == 0)
    is_kept = is_live & (is_lost == 0)
    tl.atomic_add(units + end_of_units, tl.sum(is_lost.to(tl.int64), 0))
    safe = tl.where(is_kept, top, 0.0)
    divisor = tl.where(is_kept, summed, 1.0)
    for key in range(start // KEY_BLOCK * KEY_BLOCK, tl.minimum(end, end_of_units), KEY_BLOCK):
        scores, key_position, is_inside = _scores(
            key, start, end, queries, position, keys, key_scales, table, kv_head, inner,
            KV_HEADS, DIM, PADDED, BLOCK_SIZE, WINDOW, CAPPED, FP8, KEY_BLOCK,
        )  # fmt: skip
        powers = tl.exp2(tl.fma(scores, outer, -safe[:, None]))
        weights = tl.div_rn(powers, tl.broadcast_to(divisor[:, None], powers.shape))
        # To the nearest whole number below 2^22, the even one of two.
        whole = (weights * UNITS + 12582912.0) - 12582912.0
        whole = tl.where(is_kept[:, None], whole, 0.0).to(tl.int32)
        is_told = is_inside & (key_position < end_of_units)
        tl.atomic_add(units + key_position, tl.sum(whole, 0).to(tl.int64), mask=is_told)


@triton.jit
def _scores(
    key, start, end, queries, query_positions, keys, key_scales, table, kv_head, inner,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, FP8: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a block of keys, their positions, and which of them there are."""
    position = key + tl.arange(0, KEY_BLOCK)
    is_inside = (position >= start) & (position < end)
    slots = slots_of(table, position, is_inside, BLOCK_SIZE, True)
    scores = scores_of_block(
        queries, query_positions, keys, key_scales, slots, position, is_inside, kv_head, inner,
        KV_HEADS, DIM, PADDED, WINDOW, CAPPED, FP8, True,
    )  # fmt: skip
    return scores, position, is_inside


def look_units(
    q: Tensor,
    kv: LayerKV,
    step: StepTensors,
    tiles: QueryTiles,
    units: Tensor,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Add, of all tokens and heads of `tiles`' runs, what they give to positions 0 ... n to units
    [n + 1] int64, in units of ATTENTION_UNIT; to the last, how many of their (token, head) pairs
    have weights that are no numbers, of which nothing else is added."""
    assert q.stride(1) == 1 and tiles.rows_per_tile == FEW_ROWS
    shape = HeadShape(num_heads, num_kv_heads, head_dim, window)
    powers, stored = exponents(scale, softcap), as_read(kv)
    is_fp8 = kv.keys.dtype == torch.float8_e4m3fn
    _look[(num_kv_heads, len(tiles.runs))](
        q, q.stride(0), stored.keys, stored.key_scales,
        step.query_starts, step.context_lens, step.block_tables, step.table_width,
        tiles.runs, tiles.tiles, units, len(units) - 1, powers.inner, powers.outer,
        **_constexprs(shape, block_size, softcap is not None, is_fp8),
        **_OPTIONS,
    )  # fmt: skip


def _constexprs(
    shape: HeadShape, block_size: int, is_capped: bool, is_fp8: bool
) -> dict[str, object]:
    return {
        "HEADS": shape.num_heads,
        "KV_HEADS": shape.num_kv_heads,
        "DIM": shape.head_dim,
        "PADDED": triton.next_power_of_2(shape.head_dim),
        "BLOCK_SIZE": block_size,
        "WINDOW": shape.window or 0,
        "CAPPED": is_capped,
        "FP8": is_fp8,
        "KEY_BLOCK": KEY_BLOCK,
        "ROWS": FEW_ROWS,
        "UNITS": _UNITS,
    }


def look_units_twin(
    q: Tensor,
    kv: LayerKV,
    step: StepTensors,
    tiles: QueryTiles,
    units: Tensor,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Query by query."""
    width, end_of_units = int(step.table_width), len(units) - 1
    for run in sorted(set(tiles.runs.tolist())):
        first, last = step.query_starts[run : run + 2].tolist()
        table = step.block_tables[run * width :]
        for row in range(first, last):
            end = int(step.context_lens[run]) - (last - 1 - row)
            position = torch.arange(max(0, end - window) if window else 0, end, device=q.device)
            slots = table[position // block_size].long() * block_size + position % block_size
            heads = q[row, : num_heads * head_dim].float().view(num_kv_heads, -1, head_dim)
            scores = heads @ kv_numbers(kv, slots)[0].permute(1, 2, 0) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            weights = torch.softmax(scores, -1).flatten(0, 1)
            is_lost = ~weights.isfinite().all(-1)
            units[end_of_units] += is_lost.sum()
            given = (weights[~is_lost] / ATTENTION_UNIT).round().long().sum(0)
            is_told = position < end_of_units
            units[position[is_told]] += given[is_told]


def variants() -> Iterator[KernelVariant]:
    """Of 8B models' shapes: 32 heads, 8 of KV, 128 wide."""
    numbers = ("query_starts", "context_lens", "block_tables", "table_width", "runs", "tiles")
    signature = {
        "q": "*bf16",
        **dict.fromkeys(numbers, "*i32"),
        "units": "*i64",
        **dict.fromkeys(("q_stride", "end_of_units"), "i32"),
        **dict.fromkeys(("inner", "outer"), "fp32"),
    }
    cases = {
        "bf16": ({"keys": "*bf16"}, {"key_scales": None}, None, False),
        "bf16, int8 KV": ({"keys": "*i8", "key_scales": "*fp32"}, {}, None, False),
        "bf16, window, cap": ({"keys": "*bf16"}, {"key_scales": None}, 4096, True),
    }
    for name, (stored, constants, window, is_capped) in cases.items():
        constexprs = _constexprs(HeadShape(32, 8, 128, window), 32, is_capped, False)
        options = dict(_OPTIONS)
        types = signature | stored
        yield KernelVariant(name, _look, types, constants | constexprs, options, ("q_stride",))
