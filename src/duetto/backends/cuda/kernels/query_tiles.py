"""What kernels of attention have in common: a tile's rows, and a block of keys against them.

A row is (token, head of the group), packed, token by token. Knows neither sums nor values.
"""

import torch
import triton
import triton.language as tl

from duetto.backends.cuda.tensors import LayerKV


def as_read(kv: LayerKV) -> LayerKV:
    """fp8 as whole numbers: GPUs before sm_89 know none."""
    if kv.keys.dtype != torch.float8_e4m3fn:
        return kv
    return kv._replace(keys=kv.keys.view(torch.int8), values=kv.values.view(torch.int8))


@triton.jit
def rows_of_tile(
    place, runs, tiles, query_starts, context_lens, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    """The tile at `place` of the launch: its run, where that run's queries begin, and of each row
    its token in the run, its head in the group, its position, and whether there is such a row."""
    run = tl.load(runs + place)
    first_query = tl.load(query_starts + run)
    num_queries = tl.load(query_starts + run + 1) - first_query
    row = tl.load(tiles + place) * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    position = tl.load(context_lens + run) - num_queries + token
    return run, first_query, token, row % GROUP, position, token < num_queries


@triton.jit
def keys_of_tile(
    place, runs, tiles, query_starts, context_lens, ROWS: tl.constexpr, GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Positions: keys that some row of the tile sees are start ... end, and all rows see
    all_start ... all_end (perhaps none). WINDOW 0 is none."""
    run = tl.load(runs + place)
    num_queries = tl.load(query_starts + run + 1) - tl.load(query_starts + run)
    before = tl.load(context_lens + run) - num_queries
    first_row = tl.load(tiles + place) * ROWS
    first = before + first_row // GROUP
    last = before + tl.minimum(num_queries - 1, (first_row + ROWS - 1) // GROUP)
    start = 0
    all_start = 0
    if WINDOW:
        start = tl.maximum(first - WINDOW + 1, 0)
        all_start = tl.maximum(last - WINDOW + 1, 0)
    return start, last + 1, all_start, first + 1


@triton.jit
def load_queries(q, first, is_live, DIM: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED], zeros beyond DIM and in rows that there are not. first: where each row's
    numbers begin in q."""
    dim = tl.arange(0, PADDED)
    places = q + first[:, None] + dim[None, :]
    return tl.load(places, mask=is_live[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def slots_of(table, positions, is_inside, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Where the KV of some positions lies, of a run whose blocks are in `table`."""
    if MASKED:
        block = tl.load(table + positions // BLOCK_SIZE, mask=is_inside, other=0)
    else:
        block = tl.load(table + positions // BLOCK_SIZE)
    return block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def load_part(places, is_inside, in_dim, MASKED: tl.constexpr, PADS: tl.constexpr):
    """Keys or values, zeros where there are none. Masks that hold everywhere cost time."""
    if MASKED and PADS:
        return tl.load(places, mask=is_inside & in_dim, other=0.0)
    if MASKED:
        return tl.load(places, mask=is_inside, other=0.0)
    if PADS:
        return tl.load(places, mask=in_dim, other=0.0)
    return tl.load(places)


@triton.jit
def widened_kv(block, dtype: tl.constexpr, FP8: tl.constexpr):
    """Exactly. fp8 is read as int8: e4m3's bits where fp16 has its own are the number / 256, also
    below its normal numbers; the other 256 is in `load_scales`."""
    if FP8:
        bits = block.to(tl.int16)
        bits = ((bits & 0x7F) << 7) | (bits & -32768)
        return bits.to(tl.float16, bitcast=True).to(dtype)
    else:
        return block.to(dtype)


@triton.jit
def load_scales(
    scales,
    slots,
    kv_head,
    is_inside,
    KV_HEADS: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What each slot's row of this head is multiplied with."""
    if MASKED:
        found = tl.load(scales + slots * KV_HEADS + kv_head, mask=is_inside, other=0.0)
    else:
        found = tl.load(scales + slots * KV_HEADS + kv_head)
    return found * 256.0 if FP8 else found


@triton.jit
def scores_of_block(
    queries,
    query_positions,
    keys,
    key_scales,
    slots,
    key_positions,
    is_inside,
    kv_head,
    inner,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[rows, keys], to be multiplied with `outer`: -inf for keys that a row does not see."""
    dim = tl.arange(0, PADDED)
    places = keys + (slots[None, :] * KV_HEADS + kv_head) * DIM + dim[:, None]
    block = load_part(places, is_inside[None, :], (dim < DIM)[:, None], MASKED, DIM != PADDED)
    block = widened_kv(block, queries.dtype, FP8)
    scores = tl.dot(queries, block, input_precision="ieee")
    if key_scales is not None:
        scales = load_scales(key_scales, slots, kv_head, is_inside, KV_HEADS, FP8, MASKED)
        scores = scores * scales[None, :]
    if CAPPED:
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * inner))
    if MASKED:
        is_seen = (key_positions[None, :] <= query_positions[:, None]) & is_inside[None, :]
        if WINDOW:
            is_seen = is_seen & (key_positions[None, :] > query_positions[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
    return scores
