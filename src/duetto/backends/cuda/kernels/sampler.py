"""From logits to tokens: steps 6 to 9 of runner/sampler.py on the device, and the very same token.

Arithmetic that decides is fp64, each operation rounded once: no contraction to fma, division and
conversions to nearest, logarithms and exponentials by the operations of runner/gumbel.py and
runner/candidates.py. Weights are whole numbers, so their sums are exact in any order.

Two launches. The first reads the logits once, a chunk of a row per program, and finds the chunk's
largest logit and, by an fp32 bound, its likeliest draw. The second is one program per row: it
settles exactly between the chunks, and draws anew where a row asks for filters
(sampler_filters.py). The twin is in sampler_twin.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.sampler_filters import draw_filtered
from duetto.backends.cuda.kernels.sampler_numbers import (
    BEYOND,
    LEAST_BOUNDED_T,
    MOST_BOUNDED_T,
    SLACK,
    exact_scores,
    scores_about,
)
from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.sizes import SAMPLER_CHUNK, SAMPLER_LIST, SAMPLER_PARTS, sampler_list

NOT_FINITE = tl.constexpr(-1)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


class SampleTensors(NamedTuple):
    """SampleArrays (backends/device.py) on the device."""

    temperatures: Tensor  # [L] fp64
    keys: Tensor  # [L] int64: bit patterns
    top_ks: Tensor  # [L] int32
    top_ps: Tensor  # [L] fp64
    min_gaps: Tensor  # [L] fp64


class SamplerScratch(NamedTuple):
    """What the first launch tells the second, of each chunk of each row: [L, chunks]; and what the
    second keeps of a row."""

    chunk: int  # logits of a chunk
    largest: Tensor  # fp32; NaN if there is one in the chunk
    largest_ids: Tensor  # int32
    likeliest: Tensor  # fp32: the logit of the likeliest draw
    likeliest_ids: Tensor  # int32
    num_close: Tensor  # int32: draws that fp32 cannot tell from it, itself among them
    parts: Tensor  # [L, chunks * SAMPLER_PARTS] fp32: the largest of each part of a chunk
    list_x: Tensor  # [L, list] fp32: the logits of a row that are gathered ...
    list_ids: Tensor  # [L, list] int32: ... and their tokens


def make_scratch(
    max_rows: int,
    vocab_size: int,
    device: torch.device | str,
    chunk: int = SAMPLER_CHUNK,
    list_size: int | None = None,
) -> SamplerScratch:
    """`chunk` and `list_size`: powers of two."""
    list_size = list_size or sampler_list(vocab_size)
    num_chunks = triton.cdiv(vocab_size, chunk)

    def numbers(width: int) -> Tensor:
        return torch.empty((max_rows, width), dtype=torch.float32, device=device)

    def ids(width: int) -> Tensor:
        return torch.empty((max_rows, width), dtype=torch.int32, device=device)

    return SamplerScratch(
        chunk,
        *(numbers(num_chunks), ids(num_chunks), numbers(num_chunks), ids(num_chunks)),
        *(ids(num_chunks), numbers(num_chunks * SAMPLER_PARTS)),
        *(numbers(list_size), ids(list_size)),
    )


def sample(logits: Tensor, rows: SampleTensors, scratch: SamplerScratch, out: Tensor) -> None:
    """out [L] int32: the token of each row of logits [L, V] fp32, or -1 (NOT_FINITE)."""
    num_rows, vocab_size = logits.shape
    chunk, *told, list_x, list_ids = scratch
    num_chunks = triton.cdiv(vocab_size, chunk)
    assert logits.stride(1) == 1 and num_rows <= scratch.largest.shape[0]
    assert num_chunks == scratch.largest.shape[1], "the scratch is for another vocabulary"
    _look_at_chunks[(num_rows, num_chunks)](
        *(logits, logits.stride(0), vocab_size, rows.temperatures, rows.keys, *told),
        chunk_size=chunk,
        num_parts=SAMPLER_PARTS,
        **OPTIONS,
    )
    _choose[(num_rows,)](
        *(logits, logits.stride(0), vocab_size, num_chunks, *rows, *told, list_x, list_ids, out),
        chunk_size=chunk,
        num_parts=SAMPLER_PARTS,
        list_size=list_x.shape[1],
        max_chunks=triton.next_power_of_2(num_chunks),
        **OPTIONS,
    )


@triton.jit
def _look_at_chunks(
    logits,
    row_stride,
    vocab_size,
    temperatures,
    keys,
    largest,
    largest_ids,
    likeliest,
    likeliest_ids,
    num_close,
    parts,
    chunk_size: tl.constexpr,
    num_parts: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * chunk_size + tl.arange(0, chunk_size)
    x = tl.load(logits + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    out = row * tl.num_programs(1) + chunk
    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x == x, x, float("-inf"))
    most = tl.max(x, 0)
    tl.store(largest + out, tl.where(has_nan, float("nan"), most))
    part_maxima = tl.max(tl.reshape(x, (num_parts, chunk_size // num_parts)), 1)
    tl.store(parts + out * num_parts + tl.arange(0, num_parts), part_maxima)
    tl.store(largest_ids + out, tl.min(tl.where(x == most, ids, BEYOND), 0))
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        factor = (1.0 / temperature).to(tl.float32)
        about = scores_about(x, ids, most, factor, tl.load(keys + row))
        best = tl.max(about, 0)
        best_id = tl.min(tl.where(about == best, ids, BEYOND), 0)
        tl.store(likeliest + out, tl.max(tl.where(ids == best_id, x, float("-inf")), 0))
        tl.store(likeliest_ids + out, best_id)
        tl.store(num_close + out, tl.sum((about >= best - SLACK).to(tl.int32), 0))


@triton.jit
def _choose(
    logits,
    row_stride,
    vocab_size,
    num_chunks,
    temperatures,
    keys,
    top_ks,
    top_ps,
    min_gaps,
    largest,
    largest_ids,
    likeliest,
    likeliest_ids,
    num_close,
    parts,
    list_x,
    list_ids,
    out,
    chunk_size: tl.constexpr,
    num_parts: tl.constexpr,
    list_size: tl.constexpr,
    max_chunks: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits, start = logits + row * row_stride, row * num_chunks
    places = tl.arange(0, max_chunks)
    is_chunk = places < num_chunks
    maxima = tl.load(largest + start + places, mask=is_chunk, other=float("-inf"))
    has_nan = tl.max((maxima != maxima).to(tl.int32), 0) > 0
    most = tl.max(tl.where(maxima == maxima, maxima, float("-inf")), 0)
    is_finite = (has_nan == 0) & (most > float("-inf")) & (most < float("inf"))
    temperature = tl.load(temperatures + row)
    token = tl.full((), NOT_FINITE, tl.int32)
    if is_finite & (temperature == 0.0):
        ids = tl.load(largest_ids + start + places, mask=is_chunk, other=BEYOND)
        token = tl.min(tl.where(maxima == most, ids, BEYOND), 0)
    if is_finite & (temperature > 0.0):
        first, key = most.to(tl.float64), tl.load(keys + row)
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        min_gap = tl.load(min_gaps + row)
        x = tl.load(likeliest + start + places, mask=is_chunk, other=float("-inf"))
        ids = tl.load(likeliest_ids + start + places, mask=is_chunk, other=0)
        close = tl.load(num_close + start + places, mask=is_chunk, other=1)
        scores = exact_scores(x, ids, first, temperature, key)
        score = tl.max(scores, 0)
        token = tl.min(tl.where(scores == score, ids, BEYOND), 0)
        is_unclear = (close > 1) & (scores >= score - 2 * SLACK)
        is_clear = tl.max(is_unclear.to(tl.int32), 0) == 0
        is_clear &= (temperature >= LEAST_BOUNDED_T) & (temperature <= MOST_BOUNDED_T)
        is_free = ((top_k <= 0) | (top_k >= vocab_size)) & (top_p >= 1.0)
        is_free &= min_gap == float("-inf")
        if (is_clear & is_free) == 0:
            token = draw_filtered(
                *(logits, vocab_size, num_chunks, largest + start, parts + start * num_parts),
                *(maxima, list_x + row * list_size, list_ids + row * list_size),
                *(first, temperature, key, top_k, top_p, min_gap),
                *(chunk_size, num_parts, list_size),
            )
    tl.store(out + row, token)


def variants() -> Iterator[KernelVariant]:
    """For a vocabulary of 128,256."""
    numbers = {"logits": "*fp32", "row_stride": "i32", "vocab_size": "i32"}
    told = {"largest": "*fp32", "largest_ids": "*i32", "likeliest": "*fp32"}
    told |= {"likeliest_ids": "*i32", "num_close": "*i32", "parts": "*fp32"}
    params = {"temperatures": "*fp64", "keys": "*i64"}
    filters = {"top_ks": "*i32", "top_ps": "*fp64", "min_gaps": "*fp64"}
    sizes = {"chunk_size": SAMPLER_CHUNK, "num_parts": SAMPLER_PARTS}
    yield KernelVariant(
        *("chunks of logits", _look_at_chunks, numbers | params | told),
        *(sizes, OPTIONS, ("row_stride", "vocab_size")),
    )
    signature = numbers | {"num_chunks": "i32"} | params | filters | told
    signature |= {"list_x": "*fp32", "list_ids": "*i32", "out": "*i32"}
    yield KernelVariant(
        *("tokens of rows", _choose, signature),
        *(sizes | {"list_size": SAMPLER_LIST, "max_chunks": 32}, OPTIONS),
        ("row_stride", "vocab_size", "num_chunks"),
    )
