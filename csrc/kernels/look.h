// How much attention some rows give to some positions: the weights of kernels/attention.h, told and not
// used. Each is rounded to a whole number of units, and whole numbers are summed, so that neither the
// order nor who shares the work changes a sum.
//
// A row goes through its tiles twice: for its maximum and its sum, then for its weights. That is about
// the work of attention itself once more, and needs no room for the scores of a whole context.
#pragma once

#include "kernels/attention.h"

namespace duetto {
namespace DUETTO_ISA {

inline constexpr float kLookUnits = 0x1p20f;  // a weight of 1 is so many

// Positions begin ... end of the tile at `start`; columns from ... to are whole vectors around them.
struct TilePart {
    int64_t start, begin, end, from, to;
};

template <typename Visit>
DUETTO_INLINE void visit_tiles(int64_t begin, int64_t end, Visit visit) {
    while (begin < end) {
        const int64_t start = begin / kTileTokens * kTileTokens;
        const int64_t stop = min64(end, start + kTileTokens);
        visit(TilePart{start, begin, stop, (begin - start) / kKvPanel * kKvPanel,
                       round_up(stop - start, kLanes)});
        begin = stop;
    }
}

// Scores of all rows, not yet shaped
template <typename Format>
static void look_at_tile(const AttentionArgs& args, const int32_t* blocks, int64_t kv_head,
                         const Workspace& w, int64_t rows, const TilePart& t) {
    widen_tile<Format, false>(args.kv, blocks, kv_head, t.start, t.begin, t.end, t.end, w);
    multiply_tile<false>(rows, w.q, w.head_dim, w.keys + t.from * w.head_dim, w.head_dim * kKvPanel,
                         w.head_dim, w.scores + t.from, kTileTokens, (t.to - t.from) / kLanes);
}

template <typename Format>
DUETTO_INLINE float shape_row(const AttentionArgs& args, const Workspace& w, int64_t row,
                              const TilePart& t) {
    return shape_scores<Format>(args, w, row, t.from, t.to, max64(w.first[row], t.begin) - t.start,
                                min64(w.end[row], t.end) - t.start);
}

// Takes a row's scores into its maximum and its sum.
template <typename Format>
DUETTO_INLINE void look_for_sum(const AttentionArgs& args, const Workspace& w, int64_t row,
                                const TilePart& t) {
    const float top = shape_row<Format>(args, w, row, t);
    vf sum = load(w.sums + row * kLanes);
    if (top > w.top[row]) {
        sum *= exp2_nonpositive(set1(w.top[row] - top));
        w.top[row] = top;
    }
    const float* scores = w.scores + row * kTileTokens;
    for (int64_t c = t.from; c < t.to; c += kLanes)
        sum += exp2_nonpositive(load(scores + c) - set1(w.top[row]));
    store(w.sums + row * kLanes, sum);
}

// Adds a row's weights to `sums`, of positions from t.begin on.
template <typename Format>
DUETTO_INLINE void look_for_weights(const AttentionArgs& args, const Workspace& w, int64_t row,
                                    const TilePart& t, int64_t* sums) {
    shape_row<Format>(args, w, row, t);
    float* scores = w.scores + row * kTileTokens;
    const vf top = set1(w.top[row]), units = set1(w.joined_sum[row]);
    for (int64_t c = t.from; c < t.to; c += kLanes)  // the nearest whole number is in the low bits
        store(scores + c, exp2_nonpositive(load(scores + c) - top) * units + set1(kRound));
    for (int64_t c = t.begin - t.start; c < t.end - t.start; ++c)
        *sums++ += (int32_t)(float_bits(scores[c]) - float_bits(kRound));
}

// Units for each part of its sum that a row's weight is; 0 if its weights are no numbers.
DUETTO_INLINE float units_of(const Workspace& w, int64_t row) {
    const float sum = sum_of_lanes(load(w.sums + row * kLanes));
    return sum > 0 && sum < __builtin_inff() ? kLookUnits / sum : 0;
}

template <typename Format>
static void look_of_chunk(const AttentionArgs& args, const StepView& step, const LookItem& item,
                          int64_t pair_begin, int64_t rows, const Workspace& w, int64_t* sums) {
    load_chunk(args, step, item.row_begin, item.kv_head, pair_begin, rows, w);
    const int32_t* blocks = step.block_tables + item.request * step.max_blocks;
    const Seen seen = seen_by(w, rows);
    for (int64_t r = 0; r < rows; ++r) w.top[r] = kLowest;
    std::memset(w.sums, 0, (size_t)(rows * kLanes) * sizeof(float));
    visit_tiles(seen.begin, seen.end, [&](const TilePart& t) {
        look_at_tile<Format>(args, blocks, item.kv_head, w, rows, t);
        for (int64_t r = 0; r < rows; ++r) look_for_sum<Format>(args, w, r, t);
    });
    for (int64_t r = 0; r < rows; ++r) {
        w.joined_sum[r] = units_of(w, r);
        if (w.joined_sum[r] == 0) ++sums[item.end - item.begin];
    }
    const int64_t begin = max64(seen.begin, item.begin), end = min64(seen.end, item.end);
    visit_tiles(begin, end, [&](const TilePart& t) {
        look_at_tile<Format>(args, blocks, item.kv_head, w, rows, t);
        for (int64_t r = 0; r < rows; ++r)
            if (w.joined_sum[r] > 0)
                look_for_weights<Format>(args, w, r, t, sums + (t.begin - item.begin));
    });
}

template <typename Format>
static void look_of_item(const AttentionArgs& args, const StepView& step, const LookItem& item,
                         int64_t* sums, uint8_t* scratch) {
    const Workspace w = workspace(args.kv.head_dim, scratch);
    const int64_t pairs = (item.row_end - item.row_begin) * group_size(args);
    for (int64_t begin = 0; begin < pairs; begin += kChunkRows)
        look_of_chunk<Format>(args, step, item, begin, min64(kChunkRows, pairs - begin), w, sums);
}

static void look(const AttentionArgs* args, const StepView* step, const LookItem* item,
                 int64_t* sums, uint8_t* scratch) {
    switch (args->kv.format) {
        case KvFormat::f32:
            return look_of_item<KvF32>(*args, *step, *item, sums, scratch);
        case KvFormat::f16:
            return look_of_item<KvF16>(*args, *step, *item, sums, scratch);
        case KvFormat::bf16:
            return look_of_item<KvBf16>(*args, *step, *item, sums, scratch);
        case KvFormat::int8:
            return look_of_item<KvInt8>(*args, *step, *item, sums, scratch);
    }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
