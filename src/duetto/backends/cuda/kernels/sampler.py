"""From logits to tokens: steps 6 to 9 of runner/sampler.py on the device, and the very same token.

Arithmetic that decides is fp64, each operation rounded once: no contraction to fma, division and
conversions to nearest, logarithms and exponentials by the operations of runner/gumbel.py and
runner/candidates.py. Weights are whole numbers, so their sums are exact in any order.

Two launches. The first reads the logits once, a chunk of a row per program, and finds the chunk's
largest logit and, by an fp32 bound, its likeliest draw. The second is one program per row: it
settles exactly between the chunks. Filters cost only the rows that ask for them: their tokens
come first in the order (logit, then lower id), so a draw that lies outside of them limits the next
draw to what is ahead of it, as in csrc/sampler.cpp. A chunk that cannot matter is not read again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from duetto.backends.cuda.kernels.variant import KernelVariant
from duetto.backends.cuda.sizes import SAMPLER_CHUNK

NOT_FINITE = tl.constexpr(-1)
_BEYOND = tl.constexpr(0x7FFFFFFF)  # after all ids
_SLACK = tl.constexpr(2e-4)  # of fp32 scores within 40 of the largest: twenty times their error
_MAX_NOISE = tl.constexpr(22.9)
_LEAST_T = tl.constexpr(1e-30)  # outside of these two, fp32 says nothing, and all is computed
_MOST_T = tl.constexpr(1e30)
_MAX_DOUBLE = tl.constexpr(1.7976931348623157e308)
_LEAST_GAP = tl.constexpr(-64.0)
_WEIGHED = tl.constexpr(29.0)  # a gap that is larger weighs 0
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
_ROUNDER = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: what is added to it is a whole number
_TWO_52 = tl.constexpr(4503599627370496.0)
_ROOT_OF_HALF = tl.constexpr(0x3FE6A09E667F3BCD)  # the bits of a double
_MANTISSA = tl.constexpr(0xFFFFFFFFFFFFF)


class SampleTensors(NamedTuple):
    """SampleArrays (backends/device.py) on the device."""

    temperatures: Tensor  # [L] fp64
    keys: Tensor  # [L] int64: bit patterns
    top_ks: Tensor  # [L] int32
    top_ps: Tensor  # [L] fp64
    min_gaps: Tensor  # [L] fp64


class SamplerScratch(NamedTuple):
    """What the first launch tells the second, of each chunk of each row: [L, chunks]."""

    chunk: int  # logits of a chunk
    largest: Tensor  # fp32; NaN if there is one in the chunk
    largest_ids: Tensor  # int32
    likeliest: Tensor  # fp32: the logit of the likeliest draw
    likeliest_ids: Tensor  # int32
    num_close: Tensor  # int32: draws that fp32 cannot tell from it, itself among them


def make_scratch(
    max_rows: int, vocab_size: int, device: torch.device | str, chunk: int = SAMPLER_CHUNK
) -> SamplerScratch:
    """`chunk`: a power of two."""
    shape = max_rows, triton.cdiv(vocab_size, chunk)
    numbers = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2)]
    ids = [torch.empty(shape, dtype=torch.int32, device=device) for _ in range(3)]
    return SamplerScratch(chunk, numbers[0], ids[0], numbers[1], ids[1], ids[2])


def sample(logits: Tensor, rows: SampleTensors, scratch: SamplerScratch, out: Tensor) -> None:
    """out [L] int32: the token of each row of logits [L, V] fp32, or -1 (NOT_FINITE)."""
    num_rows, vocab_size = logits.shape
    chunk, *told = scratch
    num_chunks = triton.cdiv(vocab_size, chunk)
    assert logits.stride(1) == 1 and num_rows <= scratch.largest.shape[0]
    assert num_chunks == scratch.largest.shape[1], "the scratch is for another vocabulary"
    _look_at_chunks[(num_rows, num_chunks)](
        *(logits, logits.stride(0), vocab_size, rows.temperatures, rows.keys, *told),
        chunk_size=chunk,
        **OPTIONS,
    )
    _choose[(num_rows,)](
        *(logits, logits.stride(0), vocab_size, num_chunks, *rows, *told, out),
        chunk_size=chunk,
        max_chunks=triton.next_power_of_2(num_chunks),
        **OPTIONS,
    )


OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


# --- exact numbers -------------------------------------------------------------------------------


@triton.jit
def _lowbias32(x):
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _hash(ids, key):
    """uint32 of each id, under both halves of the row's key."""
    x = _lowbias32(ids.to(tl.uint32) ^ key.to(tl.uint32))
    return _lowbias32(x ^ (key >> 32).to(tl.uint32))


@triton.jit
def _ln(x):
    bits = x.to(tl.int64, bitcast=True) - _ROOT_OF_HALF
    exponent = (bits >> 52).to(tl.float64)
    m = ((bits & _MANTISSA) + _ROOT_OF_HALF).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = z * 0.0 + 1.0 / 21
    for term in tl.static_range(10):
        p = p * z + 1.0 / (19 - 2 * term)
    return exponent * _LN_2 + (2.0 * s) * p


@triton.jit
def _scores(x, ids, first, temperature, key):
    """Of logits, fp64; first, fp64, is the row's largest."""
    u = (_hash(ids, key).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    noise = -_ln(-_ln(u))
    return (x.to(tl.float64) - first) / temperature + noise


@triton.jit
def _weights(x, first, inverse):
    """exp((x - first) * inverse) in whole numbers of 2^-40, as csrc/weight.h has it."""
    gap = (x.to(tl.float64) - first) * inverse
    gap = tl.where(gap > _LEAST_GAP, gap, _LEAST_GAP)
    shifted = gap * _LOG2_E + _ROUNDER
    r = gap - (shifted - _ROUNDER) * _LN_2
    series = r * (1.0 / 3628800) + 1.0 / 362880
    series = series * r + 1.0 / 40320
    series = series * r + 1.0 / 5040
    series = series * r + 1.0 / 720
    series = series * r + 1.0 / 120
    series = series * r + 1.0 / 24
    series = series * r + 1.0 / 6
    series = series * r + 0.5
    series = series * r + 1.0
    series = series * r + 1.0
    scale = (shifted.to(tl.int64, bitcast=True) << 52) + ((1023 + 40) << 52)
    placed = series * scale.to(tl.float64, bitcast=True) + _TWO_52
    return placed.to(tl.int64, bitcast=True) - 0x4330000000000000


# --- bounds in fp32 ------------------------------------------------------------------------------


@triton.jit
def _noise_about(ids, key):
    """The noise to within 1e-5. Of u near 1 by the series of -ln(1 - t), as t = 1 - u is exact."""
    x = _hash(ids, key)
    t = ((x ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    near = t * (1.0 + t * (0.5 + t * (1.0 / 3 + t * (0.25 + t * (0.2 + t * (1.0 / 6))))))
    return -tl.log(tl.where(t < 0.05, near, -tl.log(u)))


@triton.jit
def _scores_about(x, ids, reference, factor, key):
    return tl.where(x > float("-inf"), (x - reference) * factor + _noise_about(ids, key), x)


@triton.jit
def _key_of(x):
    """An unsigned number with the order of floats; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return flipped.to(tl.uint32, bitcast=True) ^ tl.full((), 0x80000000, tl.uint32)


# --- the first launch ----------------------------------------------------------------------------


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
    chunk_size: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * chunk_size + tl.arange(0, chunk_size)
    x = tl.load(logits + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    out = row * tl.num_programs(1) + chunk
    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x == x, x, float("-inf"))
    most = tl.max(x, 0)
    tl.store(largest + out, tl.where(has_nan, float("nan"), most))
    tl.store(largest_ids + out, tl.min(tl.where(x == most, ids, _BEYOND), 0))
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        factor = (1.0 / temperature).to(tl.float32)
        about = _scores_about(x, ids, most, factor, tl.load(keys + row))
        best = tl.max(about, 0)
        best_id = tl.min(tl.where(about == best, ids, _BEYOND), 0)
        tl.store(likeliest + out, tl.max(tl.where(ids == best_id, x, float("-inf")), 0))
        tl.store(likeliest_ids + out, best_id)
        tl.store(num_close + out, tl.sum((about >= best - _SLACK).to(tl.int32), 0))


# --- the second launch ---------------------------------------------------------------------------


@triton.jit
def _chunk(logits, c, vocab_size, chunk_size: tl.constexpr):
    ids = c * chunk_size + tl.arange(0, chunk_size)
    return tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")), ids


@triton.jit
def _is_within(x, ids, lowest, last, last_id):
    """Kept by min_p, and not behind the token (last, last_id)."""
    return (x.to(tl.float64) >= lowest) & ((x > last) | ((x == last) & (ids <= last_id)))


@triton.jit
def _draw(
    logits,
    vocab_size,
    num_chunks,
    largest,
    first,
    temperature,
    key,
    lowest,
    last,
    last_id,
    chunk_size: tl.constexpr,
):
    """The id of the largest exact score of all that are within."""
    is_bounded = (temperature >= _LEAST_T) & (temperature <= _MOST_T)
    factor = tl.where(is_bounded, 1.0 / temperature, 1.0).to(tl.float32)
    best, best_id = first * 0.0 + float("-inf"), last_id * 0 + _BEYOND
    for c in range(num_chunks):
        most = tl.load(largest + c)
        upper = (most.to(tl.float64) - first) / temperature + _MAX_NOISE
        if (most >= last) & (upper >= best):
            x, ids = _chunk(logits, c, vocab_size, chunk_size)
            within = _is_within(x, ids, lowest, last, last_id)
            about = _scores_about(x, ids, first.to(tl.float32), factor, key)
            bound = tl.max(tl.where(within, about, float("-inf")), 0).to(tl.float64) + _SLACK
            if (bound >= best) | (is_bounded == 0):
                scores = tl.where(within, _scores(x, ids, first, temperature, key), float("-inf"))
                score = tl.max(scores, 0)
                if score > best:
                    best = score
                    best_id = tl.min(tl.where(scores == score, ids, _BEYOND), 0)
    return best_id


@triton.jit
def _num_reaching(
    logits, vocab_size, num_chunks, chunk_keys, low, middle, high, chunk_size: tl.constexpr
):
    """How many tokens have these keys, low <= middle <= high, or more."""
    counts = tl.zeros((chunk_size,), tl.int32)
    counts_middle, counts_high = counts, counts
    places = tl.arange(0, chunk_keys.shape[0])
    for c in range(num_chunks):
        if tl.sum(((chunk_keys >= low) & (places == c)).to(tl.int32), 0) > 0:
            ids = c * chunk_size + tl.arange(0, chunk_size)
            is_token = ids < vocab_size
            keys = _key_of(tl.load(logits + ids, mask=is_token, other=0.0))
            counts += (is_token & (keys >= low)).to(tl.int32)
            counts_middle += (is_token & (keys >= middle)).to(tl.int32)
            counts_high += (is_token & (keys >= high)).to(tl.int32)
    return tl.sum(counts, 0), tl.sum(counts_middle, 0), tl.sum(counts_high, 0)


@triton.jit
def _last_of_top_k(logits, vocab_size, num_chunks, maxima, top_k, chunk_size: tl.constexpr):
    """The last of the `top_k` first tokens: its logit and its id. Its key is the largest that
    `top_k` tokens reach, found two bits at a time."""
    chunk_keys = _key_of(maxima)  # of chunks that are none, that of -inf: it does not matter
    found, one = tl.full((), 0, tl.uint32), tl.full((), 0x40000000, tl.uint32)
    for _ in range(16):
        low, middle, high = found | one, found | (one << 1), found | one | (one << 1)
        # So many reach it at least. Where that is enough, it need not be counted.
        n_low = tl.sum((chunk_keys >= low).to(tl.int32), 0)
        n_middle = tl.sum((chunk_keys >= middle).to(tl.int32), 0)
        n_high = tl.sum((chunk_keys >= high).to(tl.int32), 0)
        if (n_low > 0) & (n_high < top_k):
            low_left = tl.where(n_middle >= top_k, high, tl.where(n_low >= top_k, middle, low))
            m_low, m_middle, m_high = _num_reaching(
                *(logits, vocab_size, num_chunks, chunk_keys, low_left),
                *(tl.maximum(low_left, middle), high, chunk_size),
            )
            n_low, n_middle = tl.maximum(n_low, m_low), tl.maximum(n_middle, m_middle)
            n_high = m_high
        digit = (n_low >= top_k).to(tl.uint32) + (n_middle >= top_k).to(tl.uint32)
        digit += (n_high >= top_k).to(tl.uint32)
        found, one = found | digit * one, one >> 2
    above = found + 1
    num_above, _, _ = _num_reaching(
        logits, vocab_size, num_chunks, chunk_keys, above, above, above, chunk_size
    )
    num_left, last_id = top_k - num_above, top_k * 0 + _BEYOND
    for c in range(num_chunks):
        if num_left > 0:
            x, ids = _chunk(logits, c, vocab_size, chunk_size)
            equal = ((_key_of(x) == found) & (ids < vocab_size)).to(tl.int32)
            place = tl.cumsum(equal, 0)
            is_last = (equal > 0) & (place == num_left)
            last_id = tl.minimum(last_id, tl.min(tl.where(is_last, ids, _BEYOND), 0))
            num_left -= tl.sum(equal, 0)
    return _logit_of(found), last_id


@triton.jit
def _logit_of(key):
    """The logit that has this key."""
    flipped = (key ^ tl.full((), 0x80000000, tl.uint32)).to(tl.int32, bitcast=True)
    return (flipped ^ ((flipped >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sum_of_weights(
    logits,
    vocab_size,
    num_chunks,
    largest,
    first,
    temperature,
    lowest,
    last,
    last_id,
    chunk_size: tl.constexpr,
):
    """What all that are within weigh."""
    inverse = 1.0 / temperature
    inverse = tl.where(inverse < _MAX_DOUBLE, inverse, _MAX_DOUBLE)
    floor = first - _WEIGHED * temperature
    sums = tl.zeros((chunk_size,), tl.int64)
    for c in range(num_chunks):
        most = tl.load(largest + c)
        if (most >= last) & (most.to(tl.float64) >= floor):
            x, ids = _chunk(logits, c, vocab_size, chunk_size)
            within = _is_within(x, ids, lowest, last, last_id) & (ids < vocab_size)
            sums += tl.where(within, _weights(x, first, inverse), 0)
    return tl.sum(sums, 0)


@triton.jit
def _draw_filtered(
    logits,
    vocab_size,
    num_chunks,
    largest,
    maxima,
    first,
    temperature,
    key,
    top_k,
    top_p,
    min_gap,
    chunk_size: tl.constexpr,
):
    lowest = first + min_gap
    last, last_id = first.to(tl.float32) * 0.0 + float("-inf"), top_k * 0 + _BEYOND
    if (top_k > 0) & (top_k < vocab_size):
        last, last_id = _last_of_top_k(logits, vocab_size, num_chunks, maxima, top_k, chunk_size)
    drawn = _draw(
        *(logits, vocab_size, num_chunks, largest, first, temperature, key),
        *(lowest, last, last_id, chunk_size),
    )
    if top_p < 1.0:
        total = _sum_of_weights(
            *(logits, vocab_size, num_chunks, largest, first, temperature),
            *(lowest, last, last_id, chunk_size),
        )
        wanted = top_p * total.to(tl.float64)
        last, last_id = tl.load(logits + drawn), drawn - 1  # what is ahead of it
        ahead = _sum_of_weights(
            *(logits, vocab_size, num_chunks, largest, first, temperature),
            *(lowest, last, last_id, chunk_size),
        )
        while ahead.to(tl.float64) >= wanted:  # the nucleus holds what is wanted without it
            drawn = _draw(
                *(logits, vocab_size, num_chunks, largest, first, temperature, key),
                *(lowest, last, last_id, chunk_size),
            )
            last, last_id = tl.load(logits + drawn), drawn - 1
            ahead = _sum_of_weights(
                *(logits, vocab_size, num_chunks, largest, first, temperature),
                *(lowest, last, last_id, chunk_size),
            )
    return drawn


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
    out,
    chunk_size: tl.constexpr,
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
        ids = tl.load(largest_ids + start + places, mask=is_chunk, other=_BEYOND)
        token = tl.min(tl.where(maxima == most, ids, _BEYOND), 0)
    if is_finite & (temperature > 0.0):
        first, key = most.to(tl.float64), tl.load(keys + row)
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        min_gap = tl.load(min_gaps + row)
        x = tl.load(likeliest + start + places, mask=is_chunk, other=float("-inf"))
        ids = tl.load(likeliest_ids + start + places, mask=is_chunk, other=0)
        close = tl.load(num_close + start + places, mask=is_chunk, other=1)
        scores = _scores(x, ids, first, temperature, key)
        score = tl.max(scores, 0)
        token = tl.min(tl.where(scores == score, ids, _BEYOND), 0)
        is_unclear = (close > 1) & (scores >= score - 2 * _SLACK)
        is_clear = tl.max(is_unclear.to(tl.int32), 0) == 0
        is_clear &= (temperature >= _LEAST_T) & (temperature <= _MOST_T)
        is_free = ((top_k <= 0) | (top_k >= vocab_size)) & (top_p >= 1.0)
        is_free &= min_gap == float("-inf")
        if (is_clear & is_free) == 0:
            token = _draw_filtered(
                *(logits, vocab_size, num_chunks, largest + start, maxima),
                *(first, temperature, key, top_k, top_p, min_gap, chunk_size),
            )
    tl.store(out + row, token)


# --- the twin ------------------------------------------------------------------------------------


def sample_in_torch(
    logits: Tensor, rows: SampleTensors, scratch: SamplerScratch, out: Tensor
) -> None:
    """The slow twin of `sample`, in the order of runner/candidates.py."""
    del scratch  # it needs none
    each = zip(logits.unbind(0), *[tensor.tolist() for tensor in rows], strict=False)
    for place, (row, *params) in enumerate(each):
        out[place] = _token_in_torch(row, *params)


def _token_in_torch(
    row: Tensor, temperature: float, key: int, top_k: int, top_p: float, min_gap: float
) -> int:
    first = float(row.max())  # NaN if there is one
    if not abs(first) < float("inf"):
        return -1
    order = torch.sort(-row, stable=True).indices  # equal ones by id
    if temperature == 0.0:
        return int(order[0])
    if 0 < top_k < len(row):
        order = order[:top_k]
    order = order[row[order].double() >= first + min_gap]
    gaps = row[order].double() - first
    if top_p < 1.0:
        inverse = min(1.0 / temperature, 1.7976931348623157e308)
        weights = _weights_in_torch(gaps * inverse)
        ahead = torch.cumsum(weights, 0) - weights
        order = order[ahead.double() < top_p * float(weights.sum())]
        gaps = gaps[: len(order)]
    u = (_hash_in_torch(order, key).double() + 0.5) * 2.0**-32
    scores = gaps / temperature - _ln_in_torch(-_ln_in_torch(u))
    return int(order[scores == scores.max()].min())


def _weights_in_torch(gaps: Tensor) -> Tensor:
    gaps = gaps.clamp(min=-64.0)
    n = torch.round(gaps * 1.4426950408889634)
    r = gaps - n * 0.6931471805599453
    series = torch.full_like(r, 1.0 / 3628800)
    for divisor in (362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1):
        series = series * r
        series = series + 1.0 / divisor
    scale = ((n.to(torch.int64) + 1023 + 40) << 52).view(torch.float64)
    return torch.round(series * scale).to(torch.int64)


def _hash_in_torch(ids: Tensor, key: int) -> Tensor:
    """In int64, of which only the lower half is kept."""
    x = ids ^ (key & 0xFFFFFFFF)
    for half in (key >> 32 & 0xFFFFFFFF, 0):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        x = x ^ (x >> 16) ^ half
    return x


def _ln_in_torch(x: Tensor) -> Tensor:
    root = 0x3FE6A09E667F3BCD
    bits = x.view(torch.int64) - root
    exponent = (bits >> 52).double()
    m = ((bits & 0xFFFFFFFFFFFFF) + root).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = torch.full_like(z, 1.0 / 21)
    for odd in range(19, 0, -2):
        p = p * z
        p = p + 1.0 / odd
    return exponent * 0.6931471805599453 + (2.0 * s) * p


# --- for the table of kernels --------------------------------------------------------------------


def variants() -> Iterator[KernelVariant]:
    """For a vocabulary of 128,256."""
    numbers = {"logits": "*fp32", "row_stride": "i32", "vocab_size": "i32"}
    told = {"largest": "*fp32", "largest_ids": "*i32", "likeliest": "*fp32"}
    told |= {"likeliest_ids": "*i32", "num_close": "*i32"}
    params = {"temperatures": "*fp64", "keys": "*i64"}
    filters = {"top_ks": "*i32", "top_ps": "*fp64", "min_gaps": "*fp64"}
    yield KernelVariant(
        *("chunks of logits", _look_at_chunks, numbers | params | told),
        *({"chunk_size": SAMPLER_CHUNK}, OPTIONS, ("row_stride", "vocab_size")),
    )
    signature = numbers | {"num_chunks": "i32"} | params | filters | told | {"out": "*i32"}
    yield KernelVariant(
        *("tokens of rows", _choose, signature),
        *(
            {"chunk_size": SAMPLER_CHUNK, "max_chunks": 32},
            OPTIONS,
            ("row_stride", "vocab_size", "num_chunks"),
        ),
    )
