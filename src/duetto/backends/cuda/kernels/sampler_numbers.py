"""The numbers of the sampler's kernels: exact ones in fp64, and bounds of them in fp32.

Each operation of the exact ones is rounded once, if the launch has enable_fp_fusion=False. They
are those of runner/gumbel.py and runner/candidates.py, in the same order. Knows no rows.
"""

import triton
import triton.language as tl

SLACK = tl.constexpr(2e-4)  # of fp32 scores within 40 of the largest: twenty times their error
MAX_NOISE = tl.constexpr(22.9)
LEAST_BOUNDED_T = tl.constexpr(1e-30)  # outside of these two fp32 says nothing of scores
MOST_BOUNDED_T = tl.constexpr(1e30)
MAX_DOUBLE = tl.constexpr(1.7976931348623157e308)
WEIGHED_GAP = tl.constexpr(29.0)  # a gap that is larger weighs 0
BEYOND = tl.constexpr(0x7FFFFFFF)  # after all ids
_LEAST_GAP = tl.constexpr(-64.0)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
_ROUNDER = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: what is added to it is a whole number
_TWO_52 = tl.constexpr(4503599627370496.0)
_ROOT_OF_HALF = tl.constexpr(0x3FE6A09E667F3BCD)  # the bits of a double
_MANTISSA = tl.constexpr(0xFFFFFFFFFFFFF)


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
def exact_scores(x, ids, first, temperature, key):
    """Of logits, fp64; first, fp64, is the row's largest."""
    u = (_hash(ids, key).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    noise = -_ln(-_ln(u))
    return (x.to(tl.float64) - first) / temperature + noise


@triton.jit
def exact_weights(x, first, inverse):
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
def scores_about(x, ids, reference, factor, key):
    return tl.where(x > float("-inf"), (x - reference) * factor + _noise_about(ids, key), x)


@triton.jit
def order_key(x):
    """An unsigned number with the order of floats; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return flipped.to(tl.uint32, bitcast=True) ^ tl.full((), 0x80000000, tl.uint32)


@triton.jit
def logit_of_key(key):
    """The logit that has this key."""
    flipped = (key ^ tl.full((), 0x80000000, tl.uint32)).to(tl.int32, bitcast=True)
    return (flipped ^ ((flipped >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(temperature):
    """What gaps are multiplied by before they are weighed."""
    inverse = 1.0 / temperature
    return tl.where(inverse < MAX_DOUBLE, inverse, MAX_DOUBLE)
