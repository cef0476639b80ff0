// What attention works in: a thread's scratch, and one tile of keys and values in it as fp32, for
// the many rows that share them.
#pragma once

#include "kernels.h"
#include "kernels/attention_tile.h"
#include "kernels/kv.h"

namespace duetto {
namespace DUETTO_ISA {

inline constexpr int64_t kTileTokens = 64;
inline constexpr int64_t kChunkRows = 192;  // (query, head) pairs that are worked on together

static_assert(kSplit % kTileTokens == 0 && kTileTokens % kKvPanel == 0 &&
              kChunkRows % kRegisterRows == 0);

// A thread's scratch: everything 64-byte aligned. Rows are (query, head) pairs.
struct Workspace {
    int64_t head_dim, padded;  // padded: whole vectors
    float* q;                  // [kChunkRows][head_dim]
    float* scores;             // [kChunkRows][kTileTokens], then weights in the same place
    float *acc, *joined;       // [kChunkRows][padded]: of this split, of all splits so far
    float* sums;               // [kChunkRows][kLanes]
    float* top;                // [kChunkRows]: the split's maximum
    float *joined_top, *joined_sum;    // [kChunkRows]
    float* keys;               // [panels of tokens][head_dim][kKvPanel]
    float* values;             // [panels of head dims][kTileTokens][kKvPanel]
    float *key_scales, *value_scales;  // [kTileTokens]
    int32_t *first, *end;      // [kChunkRows]: the positions that a row sees
    int64_t bytes;
};

static Workspace workspace(int64_t head_dim, uint8_t* scratch) {
    Workspace w = {};
    w.head_dim = head_dim;
    w.padded = round_up(head_dim, kLanes);
    auto take = [&w, scratch](int64_t count) {
        float* place = (float*)((uintptr_t)scratch + (uintptr_t)w.bytes);
        w.bytes += round_up(count * (int64_t)sizeof(float), 64);
        return place;
    };
    w.q = take(kChunkRows * head_dim);
    w.scores = take(kChunkRows * kTileTokens);
    w.acc = take(kChunkRows * w.padded);
    w.joined = take(kChunkRows * w.padded);
    w.sums = take(kChunkRows * kLanes);
    w.top = take(kChunkRows);
    w.joined_top = take(kChunkRows);
    w.joined_sum = take(kChunkRows);
    w.keys = take(kTileTokens * head_dim);
    w.values = take(kTileTokens * round_up(head_dim, kKvPanel));
    w.key_scales = take(kTileTokens);
    w.value_scales = take(kTileTokens);
    w.first = (int32_t*)take(kChunkRows);
    w.end = (int32_t*)take(kChunkRows);
    return w;
}

static size_t attention_scratch_bytes(const AttentionArgs* args) {
    return (size_t)workspace(args->kv.head_dim, nullptr).bytes;
}

// -- keys and values of one tile, as fp32 ---------------------------------------------------------

// Tokens begin ... end of a block, the first of them to `column` of the panels. `next`: keys, or
// values, of the block to come, which are fetched from memory meanwhile.
template <typename Format>
static void widen_keys(const typename Format::Element* keys, const typename Format::Element* next,
                       int64_t block_size, int64_t head_dim, int64_t begin, int64_t end,
                       int64_t column, float* panels) {
    if (block_size % kLanes == 0) {  // whole vectors: those at the ends hold tokens that are masked
        column -= begin % kLanes;
        for (int64_t t = begin - begin % kLanes; t < end; t += kLanes, column += kLanes) {
            float* to = panels + column / kKvPanel * head_dim * kKvPanel + column % kKvPanel;
            for (int64_t d = 0; d < head_dim; ++d) {
                prefetch(next + d * block_size + t);
                store(to + d * kKvPanel, Format::widen(keys + d * block_size + t));
            }
        }
        return;
    }
    for (int64_t t = begin; t < end; ++t, ++column) {
        float* to = panels + column / kKvPanel * head_dim * kKvPanel + column % kKvPanel;
        for (int64_t d = 0; d < head_dim; ++d)
            to[d * kKvPanel] = Format::widen_one(keys[d * block_size + t]);
    }
}

template <typename Format>
static void widen_values(const typename Format::Element* values,
                         const typename Format::Element* next, int64_t head_dim, int64_t begin,
                         int64_t end, int64_t column, float* panels) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {  // panels lie 4 KiB apart: one after the other
        float* to = panels + (d / kKvPanel * kTileTokens + column) * kKvPanel + d % kKvPanel;
        const int64_t count = head_dim - d;
        for (int64_t t = begin; t < end; ++t, to += kKvPanel) {
            const typename Format::Element* from = values + t * head_dim + d;
            if (count >= kLanes) {
                prefetch(next + t * head_dim + d);
                store(to, Format::widen(from));
            } else {
                for (int64_t i = 0; i < kLanes; ++i)
                    to[i] = i < count ? Format::widen_one(from[i]) : 0;
            }
        }
    }
}

// Positions begin ... end of the tile that starts at `start` into the workspace. No block without a
// wanted position is touched. Without kValues: keys alone.
template <typename Format, bool kValues = true>
static void widen_tile(const KvLayer& kv, const int32_t* blocks, int64_t kv_head, int64_t start,
                       int64_t begin, int64_t end, int64_t last_end, const Workspace& w) {
    typedef typename Format::Element Element;
    const HeadLayout layout = head_layout(kv.format, kv.block_size, kv.head_dim);
    for (int64_t position = begin; position < end;) {
        const int64_t block = position / kv.block_size, first = position % kv.block_size;
        const int64_t count = min64(end - position, kv.block_size - first);
        const int64_t column = position - start;
        const uint8_t* base = kv.data + blocks[block] * kv.block_bytes + kv_head * layout.bytes;
        const uint8_t* next = base;
        if (position + count < last_end)
            next += (blocks[block + 1] - (int64_t)blocks[block]) * kv.block_bytes;
        widen_keys<Format>((const Element*)base, (const Element*)next, kv.block_size, kv.head_dim,
                           first, first + count, column, w.keys);
        if (kValues)
            widen_values<Format>((const Element*)(base + layout.values),
                                 (const Element*)(next + layout.values), kv.head_dim, first,
                                 first + count, column, w.values);
        if (kv.format == KvFormat::int8) {
            const float* scales = (const float*)(base + layout.scales) + first;
            std::memcpy(w.key_scales + column, scales, (size_t)count * sizeof(float));
            std::memcpy(w.value_scales + column, scales + kv.block_size,
                        (size_t)count * sizeof(float));
        }
        position += count;
    }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
