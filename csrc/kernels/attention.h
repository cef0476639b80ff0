// Attention over paged KV, for prompts, chunks of them and single tokens alike.
//
// Positions are cut into splits of kSplit and tiles of kTileTokens, both at absolute places. Inside
// a split a row keeps a running maximum and rescales what it has when a tile exceeds it (flash
// attention, Dao et al., 2022); splits are joined in ascending order. Which other rows share a tile
// decides nothing: a masked token weighs exactly 0, and outside a row's reach nothing of the row
// changes.
//
// Exponentials are powers of two: log2(e) is multiplied into the queries.
#pragma once

#include "kernels.h"
#include "kernels/attention_tile.h"
#include "kernels/attention_workspace.h"
#include "kernels/kv.h"
#include "kernels/vmath.h"

namespace duetto {
namespace DUETTO_ISA {

inline constexpr float kLowest = -3.40282347e38f;
inline constexpr float kMasked = -__builtin_inff();
inline constexpr float kLog2E = 1.44269504f;

// A partial result of one query: for each head of the group its maximum, its sum, then head_dim
// floats.
DUETTO_INLINE int64_t group_size(const AttentionArgs& args) {
    return args.num_heads / args.kv.num_kv_heads;
}

static int64_t attention_partial_floats(const AttentionArgs* args) {
    return group_size(*args) * (2 + args->kv.head_dim);
}

// -- one tile -------------------------------------------------------------------------------------

DUETTO_INLINE vi lane_numbers() {
    vi v = {};
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

// Scores of one row, at columns from ... to (whole vectors) of the tile, of which the row sees
// columns first ... end: scaled, capped, -inf where the row sees nothing. Returns the largest; NaN is
// passed over, and found again in the weights.
template <typename Format>
DUETTO_INLINE float shape_scores(const AttentionArgs& args, const Workspace& w, int64_t row,
                                 int64_t from, int64_t to, int64_t first, int64_t end) {
    float* scores = w.scores + row * kTileTokens;
    if (Format::kQuantized)
        for (int64_t c = from; c < to; c += kLanes)
            store(scores + c, load(scores + c) * load(w.key_scales + c));
    if (args.softcap > 0)
        for (int64_t c = from; c < to; c += kLanes)
            store(scores + c, tanh(load(scores + c)) * set1(args.softcap * kLog2E));
    if (first > from || end < to)
        for (int64_t c = from; c < to; c += kLanes) {
            const vi column = lane_numbers() + (int32_t)c;
            const vi seen = (column >= (int32_t)first) & (column < (int32_t)end);
            store(scores + c, seen ? load(scores + c) : set1(kMasked));
        }
    vf highest = set1(kMasked);
    for (int64_t c = from; c < to; c += kLanes) highest = vmax(load(scores + c), highest);
    return max_of_lanes(highest);
}

// The row's maximum takes them in.
template <typename Format>
DUETTO_INLINE void finish_scores(const AttentionArgs& args, const Workspace& w, int64_t row,
                                 int64_t from, int64_t to, int64_t first, int64_t end) {
    const float top = shape_scores<Format>(args, w, row, from, to, first, end);
    if (!(top > w.top[row])) return;
    const vf shrink = exp2_nonpositive(set1(w.top[row] - top));
    w.top[row] = top;
    float *sums = w.sums + row * kLanes, *acc = w.acc + row * w.padded;
    store(sums, load(sums) * shrink);
    for (int64_t d = 0; d < w.padded; d += kLanes) store(acc + d, load(acc + d) * shrink);
}

// Scores of one row become weights: exactly 0 where it sees nothing.
template <typename Format>
DUETTO_INLINE void exponentiate(const Workspace& w, int64_t row, int64_t from, int64_t to) {
    float* scores = w.scores + row * kTileTokens;
    const vf top = set1(w.top[row]);
    vf sum = load(w.sums + row * kLanes);
    for (int64_t c = from; c < to; c += kLanes) {
        const vf weight = exp2_nonpositive(load(scores + c) - top);
        sum += weight;
        store(scores + c, Format::kQuantized ? weight * load(w.value_scales + c) : weight);
    }
    store(w.sums + row * kLanes, sum);
}

// Columns of the tile at `start` that any of these rows sees, of those that hold positions begin
// ... end
struct Reach {
    int64_t first, last;
};
DUETTO_INLINE Reach reach_of(const Workspace& w, int64_t row, int64_t count, int64_t start,
                             int64_t begin, int64_t end) {
    int64_t first = end, last = begin;
    for (int64_t r = row; r < row + count; ++r) {
        if (w.first[r] < first) first = w.first[r];
        if (w.end[r] > last) last = w.end[r];
    }
    return {max64(first, begin) - start, min64(last, end) - start};
}

template <typename Format>
static void softmax(const AttentionArgs& args, const Workspace& w, int64_t row, int64_t count,
                    int64_t start, Reach reach, int64_t from, int64_t to) {
    // rows by themselves, so that their latencies overlap
    for (int64_t r = row; r < row + count; ++r)
        finish_scores<Format>(args, w, r, from, to, max64(w.first[r] - start, reach.first),
                              min64(w.end[r] - start, reach.last));
    for (int64_t r = row; r < row + count; ++r) exponentiate<Format>(w, r, from, to);
}

// Many rows: the tile at `start`, of which the workspace holds positions begin ... end, for a
// register tile of rows after the other.
template <typename Format>
static void attend_widened(const AttentionArgs& args, const Workspace& w, int64_t rows,
                           int64_t start, int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; row += kRegisterRows) {
        const int64_t count = min64(kRegisterRows, rows - row);
        const Reach reach = reach_of(w, row, count, start, begin, end);
        if (reach.first >= reach.last) continue;
        const int64_t from = reach.first / kKvPanel * kKvPanel, to = round_up(reach.last, kLanes);
        float* scores = w.scores + row * kTileTokens;
        multiply_tile<false>(count, w.q + row * w.head_dim, w.head_dim, w.keys + from * w.head_dim,
                             w.head_dim * kKvPanel, w.head_dim, scores + from, kTileTokens,
                             (to - from) / kLanes);
        softmax<Format>(args, w, row, count, start, reach, from, to);
        multiply_tile<true>(count, scores + reach.first, kTileTokens,
                            w.values + reach.first * kKvPanel, kTileTokens * kKvPanel,
                            reach.last - reach.first, w.acc + row * w.padded, w.padded,
                            w.padded / kLanes);
    }
}

// -- few rows: straight from the blocks -----------------------------------------------------------

DUETTO_INLINE bool is_direct(const KvLayer& kv, int64_t rows) {
    return rows <= kKvDirectRows && kv.block_size % kRun == 0 && kv.head_dim % kLanes == 0;
}

// The runs of the tile at `start` that hold some of positions begin ... end
template <typename Format>
static Runs<Format> find_runs(const KvLayer& kv, const int32_t* blocks, int64_t kv_head,
                              int64_t start, int64_t begin, int64_t end, int64_t last_end,
                              const Workspace& w) {
    typedef typename Format::Element Element;
    const HeadLayout layout = head_layout(kv.format, kv.block_size, kv.head_dim);
    auto head_of = [&](int64_t position) {
        return kv.data + blocks[position / kv.block_size] * kv.block_bytes + kv_head * layout.bytes;
    };
    Runs<Format> runs = {};
    for (int i = 0; i < (int)(kTileTokens / kRun); ++i) {
        const int64_t position = start + i * kRun;
        if (position + kRun <= begin || position >= end) continue;
        const int64_t slot = position % kv.block_size;
        const uint8_t* head = head_of(position);
        runs.keys[i] = runs.next_keys[i] = (const Element*)head + slot;
        runs.values[i] = runs.next_values[i] =
            (const Element*)(head + layout.values) + slot * kv.head_dim;
        if (kv.format == KvFormat::int8) {
            const float* scales = (const float*)(head + layout.scales) + slot;
            std::memcpy(w.key_scales + i * kRun, scales, kRun * sizeof(float));
            std::memcpy(w.value_scales + i * kRun, scales + kv.block_size, kRun * sizeof(float));
        }
        const int64_t next = position + kTileTokens;
        if (next >= last_end) continue;
        const uint8_t* next_head = head_of(next);
        runs.next_keys[i] = (const Element*)next_head + next % kv.block_size;
        runs.next_values[i] =
            (const Element*)(next_head + layout.values) + next % kv.block_size * kv.head_dim;
    }
    return runs;
}

template <typename Format, int kRows>
static void attend_runs(const AttentionArgs& args, const Workspace& w, const Runs<Format>& runs,
                        int64_t row, int64_t start, Reach reach) {
    const int from = (int)(reach.first / kRun), to = (int)((reach.last + kRun - 1) / kRun);
    float* scores = w.scores + row * kTileTokens;
    score_rows<Format, kRows>(w.q + row * w.head_dim, runs, from, to, args.kv.block_size,
                              w.head_dim, scores, kTileTokens);
    softmax<Format>(args, w, row, kRows, start, reach, from * kRun, to * kRun);
    weigh_rows<Format, kRows>(scores, kTileTokens, runs, reach.first, reach.last, w.head_dim,
                              w.acc + row * w.padded, w.padded);
}

// `count` rows, 1 ... kRows
template <typename Format, int kRows>
DUETTO_INLINE void attend_some_runs(int64_t count, const AttentionArgs& args, const Workspace& w,
                                    const Runs<Format>& runs, int64_t row, int64_t start,
                                    Reach reach) {
    if (count == kRows) return attend_runs<Format, kRows>(args, w, runs, row, start, reach);
    if constexpr (kRows > 1)
        attend_some_runs<Format, kRows - 1>(count, args, w, runs, row, start, reach);
}

template <typename Format>
static void attend_direct(const AttentionArgs& args, const Workspace& w, const int32_t* blocks,
                          int64_t kv_head, int64_t rows, int64_t start, int64_t begin, int64_t end,
                          int64_t last_end) {
    const Runs<Format> runs =
        find_runs<Format>(args.kv, blocks, kv_head, start, begin, end, last_end, w);
    const Reach reach = reach_of(w, 0, rows, start, begin, end);
    for (int64_t row = 0; row < rows;) {
        const int64_t tiles = (rows - row + kDirectTile - 1) / kDirectTile;  // of rows, about even
        const int64_t count = (rows - row + tiles - 1) / tiles;
        attend_some_runs<Format, kDirectTile>(count, args, w, runs, row, start, reach);
        row += count;
    }
}

// -- one split ------------------------------------------------------------------------------------

// last_end: of the positions that come after this split, too; only to fetch them from memory in
// time
template <typename Format>
static void attend_split(const AttentionArgs& args, const int32_t* blocks, int64_t kv_head,
                         const Workspace& w, int64_t rows, int64_t begin, int64_t end,
                         int64_t last_end) {
    for (int64_t r = 0; r < rows; ++r) w.top[r] = kLowest;
    std::memset(w.sums, 0, (size_t)(rows * kLanes) * sizeof(float));
    std::memset(w.acc, 0, (size_t)(rows * w.padded) * sizeof(float));
    while (begin < end) {
        const int64_t start = begin / kTileTokens * kTileTokens;
        const int64_t stop = min64(end, start + kTileTokens);
        if (is_direct(args.kv, rows)) {
            attend_direct<Format>(args, w, blocks, kv_head, rows, start, begin, stop, last_end);
        } else {
            widen_tile<Format>(args.kv, blocks, kv_head, start, begin, stop, last_end, w);
            attend_widened<Format>(args, w, rows, start, begin, stop);
        }
        begin = stop;
    }
}

// joined += (acc, sum, top), where the larger maximum decides the scale. An empty split changes
// nothing.
DUETTO_INLINE void join(const float* acc, float sum, float top, int64_t width, float* joined,
                        float* joined_sum, float* joined_top) {
    const float highest = top > *joined_top ? top : *joined_top;
    const vf keep = exp2_nonpositive(set1(*joined_top - highest));
    const vf take = exp2_nonpositive(set1(top - highest));
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes)
        store(joined + d, fma(load(acc + d), take, load(joined + d) * keep));
    if (d < width)
        store_tail(
            joined + d,
            fma(load_first(acc + d, width - d), take, load_first(joined + d, width - d) * keep),
            width - d);
    *joined_sum = fma(set1(sum), take, set1(*joined_sum) * keep)[0];
    *joined_top = highest;
}

// acc / sum, and +0 for -0: a masked token may have added a zero of either sign
DUETTO_INLINE void write_out(const float* acc, float sum, int64_t width, float* out) {
    const vf factor = set1(1.0f / sum);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(out + d, load(acc + d) * factor + vf{});
    if (d < width) store_tail(out + d, load_first(acc + d, width - d) * factor + vf{}, width - d);
}

// -- one item -------------------------------------------------------------------------------------

// Rows of the chunk, scaled, and what each sees
static void load_chunk(const AttentionArgs& args, const StepView& step, int64_t first_row,
                       int64_t kv_head, int64_t pair_begin, int64_t rows, const Workspace& w) {
    const int64_t group = group_size(args);
    const float factor = args.softcap > 0 ? args.scale / args.softcap : args.scale * kLog2E;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first_row + (pair_begin + r) / group;
        const int64_t head = kv_head * group + (pair_begin + r) % group;
        const float* q = args.q + row * args.ldq + head * w.head_dim;
        float* to = w.q + r * w.head_dim;
        for (int64_t d = 0; d < w.head_dim; ++d) to[d] = q[d] * factor;
        const int32_t position = step.positions[row];
        w.end[r] = position + 1;
        w.first[r] = args.window > 0 && position >= args.window ? position + 1 - args.window : 0;
    }
}

// The positions that any of these rows sees
struct Seen {
    int64_t begin, end;
};
DUETTO_INLINE Seen seen_by(const Workspace& w, int64_t rows) {
    Seen seen = {w.first[0], w.end[0]};
    for (int64_t r = 1; r < rows; ++r) {
        seen.begin = min64(seen.begin, w.first[r]);
        seen.end = max64(seen.end, w.end[r]);
    }
    return seen;
}

template <typename Format>
static void attend_chunk(const AttentionArgs& args, const StepView& step, const AttentionItem& item,
                         int64_t pair_begin, int64_t rows, const Workspace& w, float* partials) {
    load_chunk(args, step, item.row_begin, item.kv_head, pair_begin, rows, w);
    const int32_t* blocks = step.block_tables + item.request * step.max_blocks;
    const int64_t group = group_size(args), head_dim = w.head_dim;
    const auto [begin, end] = seen_by(w, rows);
    const int64_t last_end = min64(end, item.split_end * (int64_t)kSplit);
    for (int64_t r = 0; r < rows; ++r) w.joined_top[r] = kLowest, w.joined_sum[r] = 0;
    std::memset(w.joined, 0, (size_t)(rows * w.padded) * sizeof(float));
    for (int64_t split = item.split_begin; split < item.split_end; ++split) {
        const int64_t from = max64(begin, split * kSplit), to = min64(end, (split + 1) * kSplit);
        if (from >= to && item.partial < 0) continue;
        attend_split<Format>(args, blocks, item.kv_head, w, rows, from, to, last_end);
        for (int64_t r = 0; r < rows; ++r)
            join(w.acc + r * w.padded, sum_of_lanes(load(w.sums + r * kLanes)), w.top[r], w.padded,
                 w.joined + r * w.padded, w.joined_sum + r, w.joined_top + r);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t pair = pair_begin + r, query = pair / group, g = pair % group;
        const float* joined = w.joined + r * w.padded;
        if (item.partial < 0) {
            float* out = args.out + (item.row_begin + query) * args.ldo;
            write_out(joined, w.joined_sum[r], head_dim,
                      out + (item.kv_head * group + g) * head_dim);
        } else {
            float* to = partials + ((item.partial + query) * group + g) * (2 + head_dim);
            to[0] = w.joined_top[r];
            to[1] = w.joined_sum[r];
            std::memcpy(to + 2, joined, (size_t)head_dim * sizeof(float));
        }
    }
}

template <typename Format>
static void attend_item(const AttentionArgs& args, const StepView& step, const AttentionItem& item,
                        float* partials, uint8_t* scratch) {
    const Workspace w = workspace(args.kv.head_dim, scratch);
    const int64_t pairs = (item.row_end - item.row_begin) * group_size(args);
    for (int64_t begin = 0; begin < pairs; begin += kChunkRows)
        attend_chunk<Format>(args, step, item, begin, min64(kChunkRows, pairs - begin), w,
                             partials);
}

static void attention(const AttentionArgs* args, const StepView* step, const AttentionItem* item,
                      float* partials, uint8_t* scratch) {
    switch (args->kv.format) {
        case KvFormat::f32:
            return attend_item<KvF32>(*args, *step, *item, partials, scratch);
        case KvFormat::f16:
            return attend_item<KvF16>(*args, *step, *item, partials, scratch);
        case KvFormat::bf16:
            return attend_item<KvBf16>(*args, *step, *item, partials, scratch);
        case KvFormat::int8:
            return attend_item<KvInt8>(*args, *step, *item, partials, scratch);
    }
}

static void attention_merge(const AttentionArgs* args, const StepView* step,
                            const AttentionItem* first, int32_t num_items, const float* partials) {
    (void)step;
    const int64_t group = group_size(*args), head_dim = args->kv.head_dim;
    const int64_t stride = 2 + head_dim;
    for (int64_t row = first->row_begin; row < first->row_end; ++row)
        for (int64_t g = 0; g < group; ++g) {
            float* out = args->out + row * args->ldo + (first->kv_head * group + g) * head_dim;
            float sum = 0, top = kLowest;
            std::memset(out, 0, (size_t)head_dim * sizeof(float));
            for (int32_t i = 0; i < num_items; ++i) {
                const int64_t place = first[i].partial + (row - first->row_begin);
                const float* partial = partials + (place * group + g) * stride;
                join(partial + 2, partial[1], partial[0], head_dim, out, &sum, &top);
            }
            write_out(out, sum, head_dim, out);
        }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
