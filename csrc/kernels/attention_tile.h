// The two products of attention. Every output is one chain of fused multiply-adds in ascending k,
// whatever the shape of the register tile around it, and wherever the second factor is read from.
//
// For many rows: one matrix kernel over panels that were widened to fp32 once.
//
// a: rows that are broadcast, [rows][k], `lda` floats from row to row
// b: panels of 2 vectors, [k][kKvPanel]; panel after panel `b_panel` floats apart
// c: [rows][...], `ldc` floats from row to row
#pragma once

#include "kernels/kv.h"
#include "kernels/simd.h"

namespace duetto {
namespace DUETTO_ISA {

inline constexpr int kKvPanel = 2 * kLanes;
#if defined(__AVX512F__) || defined(__aarch64__) || defined(DUETTO_EMULATE_512)
inline constexpr int kRegisterRows = 12;  // of 2 accumulators each: 32 registers
#else
inline constexpr int kRegisterRows = 6;   // 16 registers
#endif

// acc[r][v] += x(r) * column(v). The order decides how many registers are alive at a time: few rows
// keep their numbers and take columns one by one, many rows the other way round.
template <int kRows, int kVectors, typename X, typename Column>
DUETTO_INLINE void multiply_add(vf (&acc)[kRows][kVectors], X x, Column column) {
    if constexpr (kRows <= 3) {
        vf rows[kRows];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) rows[r] = x(r);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
            const vf c = column(v);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) acc[r][v] = fma(rows[r], c, acc[r][v]);
        }
    } else {
        vf columns[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) columns[v] = column(v);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const vf row = x(r);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(row, columns[v], acc[r][v]);
        }
    }
}

// c[kRows][kVectors] (+)= a . b, kVectors from the beginning of a panel on
template <int kRows, int kVectors, bool kAccumulate>
DUETTO_INLINE void multiply(const float* __restrict a, int64_t lda, const float* __restrict b,
                            int64_t b_panel, int64_t k, float* __restrict c, int64_t ldc) {
    vf acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
            acc[r][v] = kAccumulate ? load(c + r * ldc + v * kLanes) : vf{};
#pragma GCC unroll 4
    for (int64_t i = 0; i < k; ++i) {
        multiply_add(
            acc, [&](int r) __attribute__((always_inline)) { return set1(a[r * lda + i]); },
            [&](int v) __attribute__((always_inline)) {
                return load(b + i * kKvPanel + (v / 2) * b_panel + (v % 2) * kLanes);
            });
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

// all columns: `vectors` of them
template <int kRows, bool kAccumulate>
static void multiply_rows(const float* a, int64_t lda, const float* b, int64_t b_panel, int64_t k,
                          float* c, int64_t ldc, int64_t vectors) {
    // enough chains in flight to hide the latency of a multiply-add: 8 or more
    constexpr int kWide = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
    int64_t v = 0;
    for (; v + kWide <= vectors; v += kWide)
        multiply<kRows, kWide, kAccumulate>(a, lda, b + v / 2 * b_panel, b_panel, k, c + v * kLanes,
                                            ldc);
    for (; kWide > 2 && v + 2 <= vectors; v += 2)
        multiply<kRows, 2, kAccumulate>(a, lda, b + v / 2 * b_panel, b_panel, k, c + v * kLanes,
                                        ldc);
    if (v < vectors)
        multiply<kRows, 1, kAccumulate>(a, lda, b + v / 2 * b_panel, b_panel, k, c + v * kLanes,
                                        ldc);
}

// `rows` rows
template <bool kAccumulate>
static void multiply_tile(int64_t rows, const float* a, int64_t lda, const float* b,
                          int64_t b_panel, int64_t k, float* c, int64_t ldc, int64_t vectors) {
    auto take = [&](auto multiply_some, int64_t count) {
        for (; rows >= count; rows -= count, a += count * lda, c += count * ldc)
            multiply_some(a, lda, b, b_panel, k, c, ldc, vectors);
    };
    take(multiply_rows<kRegisterRows, kAccumulate>, kRegisterRows);
    if constexpr (kRegisterRows > 6) take(multiply_rows<6, kAccumulate>, 6);
    take(multiply_rows<4, kAccumulate>, 4);
    take(multiply_rows<2, kAccumulate>, 2);
    take(multiply_rows<1, kAccumulate>, 1);
}

// For few rows: keys and values straight from their blocks, widened in registers, while the tile
// after this one is fetched from memory (blocks lie anywhere: the processor cannot guess the next).

inline constexpr int kRun = 16;        // tokens that lie side by side in a block
inline constexpr int kKvDirectRows = 8;  // at most
inline constexpr int kAccumulators = 2 * kRegisterRows;
inline constexpr int kRunsInRegisters = kAccumulators * kLanes / kRun;
inline constexpr int kDirectTile = kRunsInRegisters < 6 ? kRunsInRegisters : 6;  // rows

// The largest power of two, up to `most`, that is not above n; at least 1
constexpr int power_of_two_in(int n, int most) {
    return most <= n || most == 1 ? most : power_of_two_in(n, most / 2);
}

// Where a tile's runs begin, and those of the next tile (or of this one, if there is none)
template <typename Format>
struct Runs {
    const typename Format::Element *keys[4], *values[4], *next_keys[4], *next_values[4];
};

// scores[row][kRun * kRuns] of runs first_run ...; q: [head_dim][kKvDirectRows]
template <typename Format, int kRows, int kRuns>
DUETTO_INLINE void score_runs(const float* __restrict q, const Runs<Format>& runs, int first_run,
                              int64_t block_size, int64_t head_dim, float* __restrict scores,
                              int64_t ld) {
    constexpr int kEach = kRun / kLanes;
    vf acc[kRows][kRuns * kEach];
    const typename Format::Element *keys[kRuns], *next[kRuns];
#pragma GCC unroll 16
    for (int i = 0; i < kRuns; ++i) {
        keys[i] = runs.keys[first_run + i];
        next[i] = runs.next_keys[first_run + i];
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kRuns * kEach; ++v) acc[r][v] = vf{};
    for (int64_t d = 0; d < head_dim; ++d) {
#pragma GCC unroll 16
        for (int i = 0; i < kRuns; ++i) prefetch(next[i] + d * block_size);
        multiply_add(
            acc, [&](int r) __attribute__((always_inline)) { return set1(q[r * head_dim + d]); },
            [&](int v) __attribute__((always_inline)) {
                return Format::widen(keys[v / kEach] + d * block_size + v % kEach * kLanes);
            });
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kRuns * kEach; ++v) store(scores + r * ld + v * kLanes, acc[r][v]);
}

// acc[row][kVectors from d on] += weights . values of columns first ... last
template <typename Format, int kRows, int kVectors>
DUETTO_INLINE void add_values(const float* __restrict weights, int64_t ld, const Runs<Format>& runs,
                              int64_t first, int64_t last, int64_t head_dim, int64_t d,
                              float* __restrict out, int64_t ldo) {
    vf acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) acc[r][v] = load(out + r * ldo + d + v * kLanes);
    while (first < last) {
        const int64_t run = first / kRun, stop = min64(last, (run + 1) * kRun);
        const typename Format::Element* values = runs.values[run] + d - run * kRun * head_dim;
        const typename Format::Element* next = runs.next_values[run] + d - run * kRun * head_dim;
        for (; first < stop; ++first) {
#pragma GCC unroll 16
            for (size_t b = 0; b < kVectors * kLanes; b += 64 / sizeof *next)
                prefetch(next + first * head_dim + b);
            multiply_add(
                acc,
                [&](int r) __attribute__((always_inline)) { return set1(weights[r * ld + first]); },
                [&](int v) __attribute__((always_inline)) {
                    return Format::widen(values + first * head_dim + v * kLanes);
                });
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) store(out + r * ldo + d + v * kLanes, acc[r][v]);
}

template <typename Format, int kRows>
static void score_rows(const float* q, const Runs<Format>& runs, int from_run, int to_run,
                       int64_t block_size, int64_t head_dim, float* scores, int64_t ld) {
    constexpr int kRuns = power_of_two_in(kAccumulators / kRows * kLanes / kRun, 4);
    int run = from_run;
    for (; run + kRuns <= to_run; run += kRuns)
        score_runs<Format, kRows, kRuns>(q, runs, run, block_size, head_dim, scores + run * kRun,
                                         ld);
    for (; run < to_run; ++run)
        score_runs<Format, kRows, 1>(q, runs, run, block_size, head_dim, scores + run * kRun, ld);
}

template <typename Format, int kRows>
static void weigh_rows(const float* weights, int64_t ld, const Runs<Format>& runs, int64_t first,
                       int64_t last, int64_t head_dim, float* out, int64_t ldo) {
    constexpr int kVectors = power_of_two_in(kAccumulators / kRows, 8);
    int64_t d = 0;
    for (; d + kVectors * kLanes <= head_dim; d += kVectors * kLanes)
        add_values<Format, kRows, kVectors>(weights, ld, runs, first, last, head_dim, d, out, ldo);
    if constexpr (kVectors > 2)
        for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes)
            add_values<Format, kRows, 2>(weights, ld, runs, first, last, head_dim, d, out, ldo);
    for (; d < head_dim; d += kLanes)
        add_values<Format, kRows, 1>(weights, ld, runs, first, last, head_dim, d, out, ldo);
}

}  // namespace DUETTO_ISA
}  // namespace duetto
