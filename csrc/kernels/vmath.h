// exp, tanh and what activations make of them, lane by lane: a lane's result depends on its own
// number only, so a row's tail, padded to a vector, has the bits that it would have in the middle.
#pragma once

#include "kernels/simd.h"

namespace duetto {
namespace DUETTO_ISA {

// the first `n` lanes of v (fewer than kLanes); loads of as many: load_first
DUETTO_INLINE void store_tail(float* p, vf v, int64_t n) {
    std::memcpy(p, &v, (size_t)n * sizeof(float));
}
DUETTO_INLINE vf load_some(const float* p, int64_t n) {
    return n >= kLanes ? load(p) : load_first(p, n);
}
DUETTO_INLINE void store_some(float* p, vf v, int64_t n) {
    n >= kLanes ? store(p, v) : store_tail(p, v, n);
}

// lanes `by` further on, in a circle
template <int by>
DUETTO_INLINE vf rotate(vf v) {
    vi from;
    for (int i = 0; i < kLanes; ++i) from[i] = (i + by) % kLanes;
#if defined(__clang__)
    vf rotated;
    for (int i = 0; i < kLanes; ++i) rotated[i] = v[from[i]];
    return rotated;
#else
    return __builtin_shuffle(v, from);
#endif
}

// The largest, and the sum, of all lanes, always in the same tree: halves onto halves.
DUETTO_INLINE float max_of_lanes(vf v) {
    if constexpr (kLanes > 8) v = vmax(v, rotate<8>(v));
    if constexpr (kLanes > 4) v = vmax(v, rotate<4>(v));
    v = vmax(v, rotate<2>(v));
    return vmax(v, rotate<1>(v))[0];
}
DUETTO_INLINE float sum_of_lanes(vf v) {
    if constexpr (kLanes > 8) v += rotate<8>(v);
    if constexpr (kLanes > 4) v += rotate<4>(v);
    v += rotate<2>(v);
    return (v + rotate<1>(v))[0];
}

// x in [lowest, highest]; NaN stays NaN
DUETTO_INLINE vf clamp(vf x, float lowest, float highest) {
    return vmax(set1(lowest), vmin(set1(highest), x));
}

// 2^f for |f| <= 1/2: minimax polynomial, 1 at 0 exactly, relative error under 2^-24 before
// rounding
DUETTO_INLINE vf exp2_fraction(vf f) {
    vf p = set1(1.5353362e-4f);
    p = fma(p, f, set1(1.3398874e-3f));
    p = fma(p, f, set1(9.6184369e-3f));
    p = fma(p, f, set1(5.5503324e-2f));
    p = fma(p, f, set1(2.4022648e-1f));
    p = fma(p, f, set1(6.9314718e-1f));
    return fma(p, f, set1(1.0f));
}

// Adding this leaves the nearest integer in the low bits of a float.
inline constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// 2^x for x <= 0; exactly 0 below -126.5 (also for -inf), 1 at 0, NaN for NaN
DUETTO_INLINE vf exp2_nonpositive(vf x) {
    x = vmax(set1(-127.0f), x);  // where the power's bits are those of 0
    vf shifted = x + set1(kRound);
    vf power = (vf)(((vu)shifted << 23) + (127u << 23));
    return exp2_fraction(x - (shifted - set1(kRound))) * power;
}

// e^x with about one unit in the last place: over the whole range, subnormal results and infinity
// included
DUETTO_INLINE vf exp(vf x) {
    x = clamp(x, -104.0f, 89.0f);
    vf shifted = fma(x, set1(1.44269504f), set1(kRound));
    vf n = shifted - set1(kRound);
    vf f = fma(n, set1(-0.693145752f), x);  // ln 2 in two parts
    f = fma(n, set1(-1.42860677e-6f), f);
    vf p = set1(1.3814613e-3f);  // e^f, |f| <= ln 2 / 2
    p = fma(p, f, set1(8.3683711e-3f));
    p = fma(p, f, set1(4.1668385e-2f));
    p = fma(p, f, set1(1.6666521e-1f));
    p = fma(p, f, set1(0.49999994f));
    p = fma(p, f, set1(1.0f));
    p = fma(p, f, set1(1.0f));
    vi exponent = (vi)shifted - (vi)set1(kRound);
    vi half = exponent >> 1;                // 2^n in two factors: n is -150 ... 128
    return p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
}

// tanh with about two units in the last place
DUETTO_INLINE vf tanh(vf x) {
    vf magnitude = (vf)((vi)x & 0x7fffffff);
    vf large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
    vf z = x * x;  // polynomial below 0.625, as in Cephes
    vf p = set1(-5.70498872745e-3f);
    p = fma(p, z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
    p = fma(p, z, set1(1.33314422036e-1f));
    p = fma(p, z, set1(-3.33332819422e-1f));
    vf small = fma(p * z, x, x);
    vf result = magnitude < set1(0.625f) ? small : large;
    // x's sign, which `small` has already but for -0
    return (vf)((vi)result | ((vi)x & (vi)set1(-0.0f)));
}

DUETTO_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }

// x/2 (1 + tanh u) = x / (1 + exp(-2u)): no cancellation where tanh is near -1
DUETTO_INLINE vf gelu_tanh(vf x) {
    vf u = x * fma(x * x, set1(0.044715f * 1.59576912f), set1(1.59576912f));  // 2 sqrt(2 / pi)
    return x / (1.0f + exp(-u));
}

}  // namespace DUETTO_ISA
}  // namespace duetto
