// out = x · weightᵀ, for every weight format, from one row to thousands.
//
// Lanes are outputs. Each output's sum walks K in ascending order in one accumulator per group
// (float formats: one in all), and a group's end is one fused multiply-add; tiles of registers, panels
// of rows and blocks of K are only ways to go there, so they do not show in the result.
//
// Packed lines are multiplied as they stream in from memory. If int8 or int4 meet more than kDirectRows
// rows, a block of K of the tile is first unpacked into scratch, which stays in L1 while they pass.
#pragma once

#include "kernels/linear_rows.h"

namespace duetto {
namespace DUETTO_ISA {

inline constexpr int64_t kLineBytes = kTile * 4;
inline constexpr int kMaxRows = 6;  // rows of a register tile
inline constexpr int64_t kDirectRows = 12;  // (measured: unpacking floats never pays)
inline constexpr int64_t kPanel = 96;  // rows whose sums wait in scratch while K is walked

// Vectors of outputs of a register tile, as many as there are registers for: directly multiplied,
// and of unpacked words; and how far ahead of what is read directly memory is fetched, in bytes (measured).
#if defined(__AVX512F__) || defined(DUETTO_EMULATE_512)
template <int R>
inline constexpr int kDirectVecs = 4;
template <int R>
inline constexpr int64_t kAhead = 4096;
inline constexpr int kVecs = 4;
#elif defined(__aarch64__)
template <int R>
inline constexpr int kDirectVecs = R == 1 ? 8 : 4;
inline constexpr int kVecs = 4;
template <int R>
inline constexpr int64_t kAhead = 4096;
#else
template <int R>
inline constexpr int kDirectVecs = R == 1   ? 8
                                   : R == 2 ? 4
                                            : 2;
inline constexpr int kVecs = 2;
template <int R>
inline constexpr int64_t kAhead =
    R <= 2 ? 2048 : 8192;  // more rows pass over a block several times
#endif
inline constexpr int64_t kVecBytes = kLanes * 4;

inline constexpr int64_t kMaxWords = 128;  // of one block: unpacked, they take 32 KiB

// bf12: lines that are decoded at a time, for few rows and for many (measured).
inline constexpr int64_t kDecodedLines = 16, kDecodedLinesOfMany = 64;

// A run of lines within one group of K, and the sums that it adds to.
struct Block {
    int64_t lines;
    int64_t line, tile_lines;  // bf12: the first of them, and all of the tile,
    const uint8_t* next;  // and the coded lines after them
    bool passed_again;  // by more rows than a register tile has
    const uint8_t* rows;  // the first row's words for these lines
    int64_t row_bytes;
    float* sums;  // [rows][64]
    int32_t* unfinished;  // [rows][64]: sums of a group that is longer than a block
    const int32_t* word_products;  // [64], kPaired: of the block's unpacked words
    // int8 and int4:
    bool first, last;  // of its group's blocks
    const uint16_t* weight_scales;  // [64]
    const uint8_t* row_groups;  // the first row's RowGroup; the others are row_bytes apart
};

// acc[r][v] += words of V vectors of outputs times R rows' words.
template <class F, int R, int V>
DUETTO_INLINE void multiply_word(typename F::Acc (&acc)[R][V], const vi (&word)[V],
                                 const uint8_t* a, int64_t lda) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const vi x = broadcast_word(a + r * lda);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] = F::dot(acc[r][v], word[v], x);
    }
}

// One line: packed as in memory, or unpacked as [kWords][V].
template <class F, int R, int V, bool kUnpacked>
DUETTO_INLINE void multiply_line(typename F::Acc (&acc)[R][V], const uint8_t* w, const uint8_t* a,
                                 int64_t lda, const uint8_t* fetched) {
    if constexpr (!kUnpacked) {
#pragma GCC unroll 8
        for (int v = 0; v < V * kVecBytes; v += 64) prefetch(fetched + v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < F::kWords; i++) {
        vi word[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            word[v] = kUnpacked ? load_int(w + (i * V + v) * kVecBytes)
                                : F::word(load_int(w + v * kVecBytes), i);
        }
        multiply_word<F, R, V>(acc, word, a + i * 4, lda);
    }
}

template <class F, int V, bool kUnpacked>
inline constexpr int64_t kStride = kUnpacked ? F::kWords * V * kVecBytes : kLineBytes;

template <class F, int R, int V, bool kUnpacked>
DUETTO_INLINE void multiply_lines(typename F::Acc (&acc)[R][V], const uint8_t* w, const uint8_t* a,
                                  int64_t lda, int64_t lines, const uint8_t* fetched) {
#pragma GCC unroll 1
    for (int64_t line = 0; line < lines; line++) {
        multiply_line<F, R, V, kUnpacked>(acc, w, a, lda, fetched);
        w += kStride<F, V, kUnpacked>;
        fetched += kIsCoded<F> ? V * kVecBytes : kLineBytes;
        a += F::kWords * 4;
    }
}

// The same for a format whose sums must be widened now and then.
template <class F, int R, int V, bool kUnpacked>
DUETTO_INLINE void multiply_narrow(vi (&acc)[R][V], const uint8_t* w, const uint8_t* a, int64_t lda,
                                   int64_t lines, const uint8_t* fetched) {
    constexpr int step = F::kNarrowWords / F::kWords;
    while (lines > 0) {
        vi narrow[R][V] = {};
        multiply_lines<F, R, V, kUnpacked>(narrow, w, a, lda, lines < step ? lines : step, fetched);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] = F::widen(acc[r][v], narrow[r][v]);
        }
        w += step * kStride<F, V, kUnpacked>;
        fetched += step * kLineBytes;
        a += step * F::kWords * 4;
        lines -= step;
    }
}

// kPaired: lines of unpacked words, two at once.
template <class F, int R, int V>
DUETTO_INLINE void multiply_paired(vi (&acc)[R][V], const uint8_t* w, const uint8_t* a, int64_t lda,
                                   int64_t lines) {
#if defined(DUETTO_PAIRED)
#pragma GCC unroll 1
    for (int64_t line = 0; line < lines; line++) {
        vi w0[V], w1[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            w0[v] = load_int(w + v * kVecBytes);
            w1[v] = load_int(w + (V + v) * kVecBytes);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vi a0 = broadcast_word(a + r * lda), a1 = broadcast_word(a + r * lda + 4);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] = dot_paired(acc[r][v], w0[v], w1[v], a0, a1);
        }
        w += kStride<F, V, true>;
        a += F::kWords * 4;
    }
#endif
}

// A block that rows pass several times leaves time to fetch all of the next one (measured: bf16 at 8
// rows 13 % faster, int8 the same).
template <int R>
DUETTO_INLINE int64_t fetched_ahead(const Block& b) {
    const int64_t block_bytes = b.lines * kLineBytes;
    return b.passed_again && block_bytes > kAhead<R> ? block_bytes : kAhead<R>;
}

// R rows (from row0 of the block on) times the block, V vectors of outputs at a time.
template <class F, int R, int V>
static __attribute__((noinline)) void tile_float(const Block& b, const uint8_t* w, int64_t row0) {
    const uint8_t* a = b.rows + row0 * b.row_bytes;
    const int64_t ahead = fetched_ahead<R>(b);
    for (int64_t output = 0; output < kTile; output += V * kLanes) {
        float* sums = b.sums + row0 * kTile + output;
        vf acc[R][V];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] = load(sums + r * kTile + v * kLanes);
        }
        // what is decoded has been fetched: all of the next block is, a part at each pass
        const uint8_t* fetched = kIsCoded<F> ? b.next + output * 4 * b.lines : w + ahead;
        multiply_lines<F, R, V, false>(acc, w, a, b.row_bytes, b.lines, fetched);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) store(sums + r * kTile + v * kLanes, acc[r][v]);
        }
        w += V * kVecBytes;
    }
}

template <class F, int R, int V, bool kUnpacked>
static __attribute__((noinline)) void tile_int(const Block& b, const uint8_t* w, int64_t row0) {
    const uint8_t* a = b.rows + row0 * b.row_bytes;
    const uint8_t* row_group = b.row_groups + row0 * b.row_bytes;
    const int64_t ahead = fetched_ahead<R>(b);
    for (int64_t output = 0; output < kTile; output += V * kLanes) {
        int32_t* unfinished = b.unfinished + row0 * kTile + output;
        vi acc[R][V];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            vi start = {};
            if constexpr (kUnpacked || !F::kPaired) {
                start = broadcast_word(row_group + r * b.row_bytes + offsetof(RowGroup, start));
            }
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                acc[r][v] = b.first ? start : load_int(unfinished + r * kTile + v * kLanes);
                if constexpr (kUnpacked && F::kPaired) {
                    acc[r][v] -= load_int(b.word_products + output + v * kLanes);
                }
            }
        }
        if constexpr (F::kPaired && kUnpacked) {
            multiply_paired<F, R, V>(acc, w, a, b.row_bytes, b.lines);
        } else if constexpr (F::kNarrow) {
            multiply_narrow<F, R, V, kUnpacked>(acc, w, a, b.row_bytes, b.lines, w + ahead);
        } else {
            multiply_lines<F, R, V, kUnpacked>(acc, w, a, b.row_bytes, b.lines, w + ahead);
        }
        w += kUnpacked ? b.lines * kStride<F, V, true> : V * kVecBytes;
        if (!b.last) {
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) {
                    store_int(unfinished + r * kTile + v * kLanes, acc[r][v]);
                }
            }
            continue;
        }
        vf scale[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) scale[v] = load_bf16(b.weight_scales + output + v * kLanes);
        float* sums = b.sums + row0 * kTile + output;
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf row_scale = (vf)broadcast_word(row_group + r * b.row_bytes);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                float* p = sums + r * kTile + v * kLanes;
                store(p, fma(to_f32(acc[r][v]), scale[v] * row_scale, load(p)));
            }
        }
    }
}

// Lines of a tile, unpacked as [64 / (kVecs * kLanes)][words][kVecs]; kPaired: and the sum of the products
// of each output's pairs of words.
template <class F>
static void unpack_lines(const uint8_t* packed, int64_t lines, uint8_t* out, int32_t* products) {
    for (int64_t output = 0; output < kTile; output += kVecs * kLanes) {
        const uint8_t* p = packed + output * 4;
        vi sum[kVecs] = {};
        for (int64_t line = 0; line < lines; line++, p += kLineBytes) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; v++) {
                const vi words = load_int(p + v * kVecBytes);
#pragma GCC unroll 4
                for (int i = 0; i < F::kWords; i++) {
                    store_int(out + (i * kVecs + v) * kVecBytes, F::word(words, i));
                }
                if constexpr (F::kPaired) {
                    sum[v] = dot_s16(sum[v], F::word(words, 0), F::word(words, 1));
                }
            }
            out += F::kWords * kVecs * kVecBytes;
        }
        if constexpr (F::kPaired) {
            for (int v = 0; v < kVecs; v++) store_int(products + output + v * kLanes, sum[v]);
        }
    }
}

template <class F, int R>
DUETTO_INLINE void multiply_rows(const Block& b, const uint8_t* w, bool unpacked, int64_t row0) {
    if constexpr (!kIsQuantized<F>) {
        tile_float<F, R, kDirectVecs<R>>(b, w, row0);
    } else if (!unpacked) {
        tile_int<F, R, kDirectVecs<R>, false>(b, w, row0);
    } else if constexpr (R > 2) {  // fewer are never unpacked
        tile_int<F, R, kVecs, true>(b, w, row0);
    }
}

// While some rows pass an unpacked block: memory for their share of the next block, L1 for the next rows.
template <class F>
DUETTO_INLINE void fetch_ahead(const Block& b, const uint8_t* share, int64_t bytes,
                               int64_t row_begin, int64_t row_end) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(share + i);
    for (int64_t row = row_begin; row < row_end; row++) {
        const uint8_t* a = b.rows + row * b.row_bytes;
        for (int64_t i = 0; i < b.lines * F::kWords * 4; i += 64) prefetch(a + i);
        prefetch(b.row_groups + row * b.row_bytes);
    }
}

template <class F>
DUETTO_INLINE void multiply_block(const Block& block, const uint8_t* packed, int64_t rows,
                                  uint8_t* scratch) {
    alignas(64) int32_t products[kTile];
    Block b = block;
    b.word_products = products;
    const uint8_t* w = packed;
    int64_t most = F::kDirectHeight;
    const bool unpacked = kIsQuantized<F> && rows > kDirectRows;
    if constexpr (kIsQuantized<F>) {
        if (unpacked) {
            unpack_lines<F>(packed, b.lines, scratch, products);
            w = scratch;
            most = F::kPaired ? 4 : kMaxRows;
        }
    }
    if constexpr (kIsCoded<F>) {
        decode_block(packed, b.tile_lines, b.line, b.lines, scratch);
        w = scratch;
        b.next = packed + sizeof(CodedHead) + (b.line + b.lines) * kCodedLineBytes;
    }
    // rows in tiles of nearly the same height: 8 as 4 + 4, not 6 + 2
    const int64_t tiles = (rows + most - 1) / most, height = rows / tiles;
    const int64_t higher = rows - tiles * height;  // tiles of one row more
    b.passed_again = tiles > 1;
    const int64_t block_bytes = b.lines * kLineBytes;
    const int64_t share = (block_bytes / tiles + 63) / 64 * 64;
    int64_t row0 = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t r = height + (tile < higher), row1 = row0 + r;
        if (unpacked) {
            fetch_ahead<F>(b, packed + block_bytes + tile * share, share, row1,
                           row1 + r < rows ? row1 + r : rows);
        }
        switch (r) {
            case 6:
                multiply_rows<F, 6>(b, w, unpacked, row0);
                break;
            case 5:
                multiply_rows<F, 5>(b, w, unpacked, row0);
                break;
            case 4:
                multiply_rows<F, 4>(b, w, unpacked, row0);
                break;
            case 3:
                multiply_rows<F, 3>(b, w, unpacked, row0);
                break;
            case 2:
                multiply_rows<F, 2>(b, w, unpacked, row0);
                break;
            default:
                multiply_rows<F, 1>(b, w, unpacked, row0);
                break;
        }
        row0 = row1;
    }
}

DUETTO_INLINE void finish_row(const float* sums, int64_t count, float* out, const float* bias,
                              bool accumulate) {
    for (int64_t i = 0; i < count; i++) {
        float x = sums[i];
        if (bias != nullptr) x += bias[i];
        out[i] = accumulate ? out[i] + x : x;
    }
}

// One tile of outputs for up to kPanel rows.
template <class F>
static void panel_tile(const PackedWeight& w, const uint8_t* prepared, int64_t rows, int64_t tile,
                       float* sums, int32_t* unfinished, uint8_t* scratch) {
    constexpr bool quantized = kIsQuantized<F>;
    constexpr int64_t most_lines = kIsCoded<F> ? kDecodedLinesOfMany : kMaxWords / F::kWords;
    const int64_t max_lines = kIsCoded<F> && rows <= kDirectRows ? kDecodedLines : most_lines;
    const RowLayout at = row_layout<F>(w);
    const int64_t lines = w.k_padded / F::kLineK;
    const int64_t groups = quantized ? num_groups(w.k, w.group) : 1;
    const int64_t group_lines = quantized && w.group != 0 ? w.group / F::kLineK : lines;
    const uint8_t* data = w.data + tile * tile_bytes<F>(lines);
    std::memset(sums, 0, (size_t)(rows * kTile) * 4);
    Block b;
    b.row_bytes = at.size;
    b.sums = sums;
    b.unfinished = unfinished;
    if constexpr (kIsCoded<F>) {
        if (rows <= kCodedRows) {
            return tile_coded_rows<kCodedRows>(rows, data, lines, prepared, at.size, sums);
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = g * group_lines;
        const int64_t end = begin + group_lines < lines ? begin + group_lines : lines;
        b.weight_scales = quantized ? w.scales + (tile * groups + g) * kTile : nullptr;
        b.row_groups = prepared + at.groups + g * (int64_t)sizeof(RowGroup);
        for (int64_t line = begin; line < end; line += max_lines) {
            b.lines = end - line < max_lines ? end - line : max_lines;
            b.rows = prepared + line * F::kWords * 4;
            b.first = line == begin;
            b.last = line + b.lines == end;
            b.line = line;
            b.tile_lines = lines;
            multiply_block<F>(b, kIsCoded<F> ? data : data + line * kLineBytes, rows, scratch);
        }
    }
}

template <class F>
static void linear_tiles(const PackedWeight& w, const uint8_t* prepared, int64_t rows,
                         int64_t tile_begin, int64_t tile_end, float* out, int64_t ldo,
                         const float* bias, bool accumulate) {
    alignas(64) float sums[kPanel * kTile];
    alignas(64) int32_t unfinished[kPanel * kTile];
    alignas(64) uint8_t scratch[kMaxWords * kLineBytes];
    const int64_t row_bytes = row_layout<F>(w).size;
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        const int64_t output = tile * kTile;
        const int64_t outputs = w.n - output < kTile ? w.n - output : kTile;
        for (int64_t row0 = 0; row0 < rows; row0 += kPanel) {
            const int64_t count = rows - row0 < kPanel ? rows - row0 : kPanel;
            panel_tile<F>(w, prepared + row0 * row_bytes, count, tile, sums, unfinished, scratch);
            for (int64_t r = 0; r < count; r++) {
                finish_row(sums + r * kTile, outputs, out + (row0 + r) * ldo + output,
                           bias == nullptr ? nullptr : bias + output, accumulate);
            }
        }
    }
}

#define DUETTO_FOR_FORMAT(weight, call) \
    switch ((weight)->format) {         \
        case WeightFormat::f32: {       \
            typedef F32 F;              \
            call;                       \
            break;                      \
        }                               \
        case WeightFormat::bf16: {      \
            typedef Bf16 F;             \
            call;                       \
            break;                      \
        }                               \
        case WeightFormat::int8: {      \
            typedef Int8 F;             \
            call;                       \
            break;                      \
        }                               \
        case WeightFormat::int4: {      \
            typedef Int4 F;             \
            call;                       \
            break;                      \
        }                               \
        case WeightFormat::bf12: {      \
            typedef Bf12 F;             \
            call;                       \
            break;                      \
        }                               \
    }

static size_t prepared_row_bytes(const PackedWeight* w) {
    size_t bytes = 0;
    DUETTO_FOR_FORMAT(w, bytes = (size_t)row_layout<F>(*w).size);
    return bytes;
}

static void prepare_rows(const PackedWeight* w, const float* x, int64_t ldx, int64_t rows,
                         uint8_t* prepared) {
    const size_t row_bytes = prepared_row_bytes(w);
    for (int64_t row = 0; row < rows; row++) {
        DUETTO_FOR_FORMAT(w, prepare<F>(*w, x + row * ldx, prepared + row * row_bytes));
    }
}

static void linear(const PackedWeight* w, const uint8_t* prepared, int64_t rows, int64_t tile_begin,
                   int64_t tile_end, float* out, int64_t ldo, const float* bias, bool accumulate) {
    DUETTO_FOR_FORMAT(
        w, linear_tiles<F>(*w, prepared, rows, tile_begin, tile_end, out, ldo, bias, accumulate));
}

static void unpack_row(const PackedWeight* w, int64_t row, float* out) {
    DUETTO_FOR_FORMAT(w, unpack<F>(*w, row, out));
}

#undef DUETTO_FOR_FORMAT

}  // namespace DUETTO_ISA
}  // namespace duetto
