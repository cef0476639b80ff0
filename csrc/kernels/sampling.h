// The sampler's passes over a row of logits; csrc/sampler.h says what they are for.
#pragma once

#include "kernels.h"
#include "kernels/vmath.h"
#include "noise.h"
#include "weight.h"

namespace duetto {
namespace DUETTO_ISA {

DUETTO_INLINE bool any(vi mask) {
    uint64_t words[kLanes / 2], found = 0;
    std::memcpy(words, &mask, sizeof words);
    for (uint64_t word : words) found |= word;
    return found != 0;
}

// The first of the largest; -1 if one is NaN or +inf, or all are -inf.
static int64_t finite_argmax(const float* row, int64_t size) {
    constexpr int64_t kBlock = 1024;
    float largest = -__builtin_inff();
    int64_t block = -1;
    vi bad = {};
    for (int64_t start = 0; start < size; start += kBlock) {
        const int64_t end = start + kBlock < size ? start + kBlock : size;
        vf top = set1(-__builtin_inff());
        int64_t i = start;
        for (; i + kLanes <= end; i += kLanes) {
            vf v = load(row + i);
            bad |= ~(v < set1(__builtin_inff()));  // NaN compares false
            top = vmax(v, top);
        }
        float most = max_of_lanes(top);
        for (; i < end; ++i) {
            if (!(row[i] < __builtin_inff())) return -1;
            most = row[i] > most ? row[i] : most;
        }
        if (most > largest) {
            largest = most;
            block = start;
        }
    }
    if (block < 0 || any(bad)) return -1;
    while (row[block] != largest) ++block;
    return block;
}

DUETTO_INLINE vf score_bound(vf logits, vu ids, vu low, vu high, vf largest, vf factor) {
    DUETTO_NOISE_HASH(vu, ids, low, high)
    const vf half = to_f32((vi)(~x >> 1)) + set1(0.25f);
    const vf surprise = set1(kBitsOfOne) - to_f32((vi)half) * set1(kPerBit);
    return (logits - largest) * factor + (surprise * set1(kLn2) + set1(kSlack));
}

// The first token, `begin` or later, whose logit is not below `lowest` and whose score may reach `best`;
// `size` if there is none.
static int64_t first_to_score(const float* row, int64_t begin, int64_t size, float largest,
                              float factor, uint64_t key, float lowest, float best) {
    const vu low = vu{} + (uint32_t)key, high = vu{} + (uint32_t)(key >> 32);
    vu ids = vu{} + (uint32_t)begin;
    for (int lane = 0; lane < kLanes; ++lane) ids[lane] += (uint32_t)lane;
    const bool is_limited = lowest > -__builtin_inff();
    const vf least = set1(lowest);
    const auto may_reach = [=](vf logits, vu of) __attribute__((always_inline)) {
        const vf bound = score_bound(logits, of, low, high, set1(largest), set1(factor));
        return (vi)(bound >= set1(best)) & (vi)(logits >= least);
    };
    int64_t i = begin;
    constexpr int kTogether = 4;  // vectors: to look at all lanes of one costs as much as its hash
    for (; i + kTogether * kLanes <= size; i += kTogether * kLanes) {
        vi may = {};
        if (is_limited) {  // most of a vocabulary is below a limit: no hash for it
            for (int v = 0; v < kTogether; ++v) may |= (vi)(load(row + i + v * kLanes) >= least);
            if (!any(may)) {
                ids += (uint32_t)(kTogether * kLanes);
                continue;
            }
            may = vi{};
        }
        for (int v = 0; v < kTogether; ++v)
            may |= may_reach(load(row + i + v * kLanes), ids + (uint32_t)(v * kLanes));
        if (any(may)) break;
        ids += (uint32_t)(kTogether * kLanes);
    }
    for (; i < size; i += kLanes, ids += (uint32_t)kLanes) {
        const int64_t count = size - i < kLanes ? size - i : kLanes;
        const vi may = may_reach(load_some(row + i, count), ids);
        if (!any(may)) continue;
        for (int lane = 0; lane < count; ++lane)
            if (may[lane]) return i + lane;
    }
    return size;
}

// Half as many doubles as there are floats in a vector: as many bytes.
typedef double vd __attribute__((vector_size(kLanes * 4)));
typedef uint64_t vq __attribute__((vector_size(kLanes * 4)));
typedef float vf_half __attribute__((vector_size(kLanes * 2)));

DUETTO_INLINE vd load_wide(const float* p) {
#if defined(__AVX512F__) && !defined(DUETTO_EMULATE_512)  // GCC 12 widens in three instructions
    return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#else
    vf_half narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, vd);
#endif
}
DUETTO_INLINE vd vmax_wide(vd a, vd b) {
#if defined(__AVX512F__) && !defined(DUETTO_EMULATE_512)
    return (vd)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
    return a > b ? a : b;
#endif
}

// Weights of kLanes / 2 logits, added to two sums where a logit is not below the sum's `lowest`.
DUETTO_INLINE void weigh_half(const float* logits, vd largest, vd inverse, const vd* lowest,
                              vq* sums) {
    const vd wide = load_wide(logits);
    const vd x = vmax_wide((wide - largest) * inverse, vd{} + kLeastGap);
    DUETTO_WEIGHT(vd, vq, x)
    for (int j = 0; j < 2; ++j) sums[j] += wide >= lowest[j] ? weight : vq{};
}

// `floor`: no logit below it counts; most of a vocabulary, if the temperature is low.
static void weigh(const float* row, int64_t size, double largest, double inverse, float floor,
                  const double* lowest, uint64_t* sums) {
    constexpr int64_t kHalf = kLanes / 2;
    const vd from[2] = {vd{} + lowest[0], vd{} + lowest[1]};
    vq totals[2] = {};
    const auto half = [&](const float* logits) __attribute__((always_inline)) {
        weigh_half(logits, vd{} + largest, vd{} + inverse, from, totals);
    };
    constexpr int64_t kTogether =
        4 * kLanes;  // logits: to look at all lanes of a vector costs much
    int64_t i = 0;
    for (; i + kTogether <= size; i += kTogether) {
        vi counts = {};
        for (int64_t j = i; j < i + kTogether; j += kLanes)
            counts |= (vi)(load(row + j) >= set1(floor));
        if (!any(counts)) continue;
        for (int64_t j = i; j < i + kTogether; j += kHalf) half(row + j);
    }
    for (; i + kLanes <= size; i += kLanes) half(row + i), half(row + i + kHalf);
    float rest[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane)
        rest[lane] = i + lane < size ? row[i + lane] : -__builtin_inff();  // weighs nothing
    half(rest), half(rest + kHalf);
    for (int j = 0; j < 2; ++j)
        for (int lane = 0; lane < kHalf; ++lane) sums[j] += totals[j][lane];
}

static void block_maxima(const float* row, int64_t size, int64_t block, float* maxima) {
    for (int64_t start = 0; start < size; start += block) {
        const int64_t end = start + block < size ? start + block : size;
        vf top = set1(-__builtin_inff());
        int64_t i = start;
        for (; i + kLanes <= end; i += kLanes) top = vmax(load(row + i), top);
        float most = max_of_lanes(top);
        for (; i < end; ++i) most = row[i] > most ? row[i] : most;
        *maxima++ = most;
    }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
