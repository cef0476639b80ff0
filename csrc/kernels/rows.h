// What is done to rows of activations between products: norms, activations, rotation. A row is
// worked on by itself, and a tail shorter than a vector goes through the same vector code.
#pragma once

#include <cmath>

#include "kernels.h"
#include "kernels/vmath.h"

namespace duetto {
namespace DUETTO_ISA {

// Doubles, and floats that become one vector of them
inline constexpr int kHalfLanes = kLanes / 2;
typedef double vd __attribute__((vector_size(kHalfLanes * 8)));
typedef float vf_half __attribute__((vector_size(kHalfLanes * 4)));

DUETTO_INLINE vd widen(const float* p) {
    vf_half x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, vd);
}

// Sum of squares in double: lanes are columns modulo 2 kLanes, then a tree. The order depends on
// the width alone.
DUETTO_INLINE double sum_of_squares(const float* x, int64_t width) {
    vd sums[4] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes)
        for (int j = 0; j < 4; ++j) {
            vd v = widen(x + i + j * kHalfLanes);
            sums[j] += v * v;
        }
    if (i < width) {
        float tail[2 * kLanes] = {};
        std::memcpy(tail, x + i, (size_t)(width - i) * sizeof(float));
        for (int j = 0; j < 4; ++j) {
            vd v = widen(tail + j * kHalfLanes);
            sums[j] += v * v;
        }
    }
    vd sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int lane = 0; lane < kHalfLanes; ++lane) total += sum[lane];
    return total;
}

static void rms_norm(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows,
                     int64_t width, int64_t group, const float* weight, float offset, float eps) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t start = 0; start < width; start += group) {
            const float* from = x + row * ldx + start;
            float* to = out + row * ldo + start;
            double mean_square = sum_of_squares(from, group) / (double)group;
            vf factor = set1((float)(1.0 / std::sqrt(mean_square + (double)eps)));
            int64_t i = 0;
            for (; i + kLanes <= group; i += kLanes)
                store(to + i, load(from + i) * factor * (load(weight + i) + set1(offset)));
            if (i < group) {
                vf scaled = load_first(from + i, group - i) * factor;
                vf w = load_first(weight + i, group - i) + set1(offset);
                store_tail(to + i, scaled * w, group - i);
            }
        }
}

template <typename F>
DUETTO_INLINE void for_each(const float* x, float* out, int64_t width, F f) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, f(load(x + i)));
    if (i < width) store_tail(out + i, f(load_first(x + i, width - i)), width - i);
}

template <typename F>
DUETTO_INLINE void for_each(const float* x, const float* y, float* out, int64_t width, F f) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, f(load(x + i), load(y + i)));
    if (i < width) {
        vf result = f(load_first(x + i, width - i), load_first(y + i, width - i));
        store_tail(out + i, result, width - i);
    }
}

static void gated_act(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows,
                      int64_t width, Activation kind) {
    for (int64_t row = 0; row < rows; ++row) {
        const float *gate = x + row * ldx, *up = gate + width;
        float* to = out + row * ldo;
        if (kind == Activation::silu)
            for_each(gate, up, to, width,
                     [](vf g, vf u) __attribute__((always_inline)) { return silu(g) * u; });
        else
            for_each(gate, up, to, width,
                     [](vf g, vf u) __attribute__((always_inline)) { return gelu_tanh(g) * u; });
    }
}

static void add(const float* x, int64_t ldx, const float* y, int64_t ldy, float* out, int64_t ldo,
                int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row)
        for_each(x + row * ldx, y + row * ldy, out + row * ldo, width,
                 [](vf a, vf b) __attribute__((always_inline)) { return a + b; });
}

static void scale(float* x, int64_t ldx, int64_t rows, int64_t width, float factor) {
    vf by = set1(factor);
    for (int64_t row = 0; row < rows; ++row)
        for_each(x + row * ldx, x + row * ldx, width,
                 [by](vf v) __attribute__((always_inline)) { return v * by; });
}

static void soft_cap(float* x, int64_t ldx, int64_t rows, int64_t width, float cap) {
    vf limit = set1(cap);
    for (int64_t row = 0; row < rows; ++row)
        for_each(x + row * ldx, x + row * ldx, width,
                 [limit](vf v) __attribute__((always_inline)) { return tanh(v / limit) * limit; });
}

static void rope(float* x, int64_t ldx, int64_t rows, int64_t num_heads, int64_t head_dim,
                 int64_t rotary_dim, const float* cos, const float* sin) {
    const int64_t half = rotary_dim / 2;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t head = 0; head < num_heads; ++head) {
            float *first = x + row * ldx + head * head_dim, *second = first + half;
            for (int64_t i = 0; i < half; i += kLanes) {
                const int64_t n = half - i;
                vf c = load_some(cos + row * half + i, n), s = load_some(sin + row * half + i, n);
                vf a = load_some(first + i, n), b = load_some(second + i, n);
                store_some(first + i, a * c - b * s, n);
                store_some(second + i, b * c + a * s, n);
            }
        }
}

static bool all_finite(const float* x, int64_t count) {
    const vi exponent = vi{} + 0x7f800000;
    vi found = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) found |= ((vi)load(x + i) & exponent) == exponent;
    if (i < count) found |= ((vi)load_first(x + i, count - i) & exponent) == exponent;
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= found[lane];
    return any == 0;
}

}  // namespace DUETTO_ISA
}  // namespace duetto
