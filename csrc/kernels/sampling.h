// The sampler's passes over a row of logits; csrc/sampler.h says what they are for.
#pragma once

#include "kernels.h"
#include "kernels/vmath.h"
#include "noise.h"

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

// The first token, `begin` or later, whose score may reach `best`; `size` if there is none.
static int64_t first_to_score(const float* row, int64_t begin, int64_t size, float largest,
                              float factor, uint64_t key, float best) {
    const vu low = vu{} + (uint32_t)key, high = vu{} + (uint32_t)(key >> 32);
    vu ids = vu{} + (uint32_t)begin;
    for (int lane = 0; lane < kLanes; ++lane) ids[lane] += (uint32_t)lane;
    const auto may_reach = [=](vf logits, vu of) __attribute__((always_inline)) {
        return (vi)(score_bound(logits, of, low, high, set1(largest), set1(factor)) >= set1(best));
    };
    int64_t i = begin;
    constexpr int kTogether = 4;  // vectors: to look at all lanes of one costs as much as its hash
    for (; i + kTogether * kLanes <= size; i += kTogether * kLanes) {
        vi may = {};
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

}  // namespace DUETTO_ISA
}  // namespace duetto
