// The seam between whoever runs a step and the code of one instruction set: plain structs and a table
// of functions. Knows no Python and no threads: a function works on the part of the work it is given.
//
// Promise of every function: what a row of a request becomes depends on that row and its own KV
// alone, bit for bit, whatever other rows, parts or threads there are. Lanes are outputs, K is walked
// in ascending order, attention is cut at absolute positions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace duetto {

enum class WeightFormat : int32_t { f32 = 0, bf16 = 1, int8 = 2, int4 = 3, bf12 = 4 };
enum class KvFormat : int32_t { f32 = 0, f16 = 1, bf16 = 2, int8 = 3 };
enum class Activation : int32_t { silu = 0, gelu_tanh = 1 };

inline constexpr int64_t kTile = 64;  // outputs that are packed together

// A weight [n, k] as the kernels read it, cut into tiles of 64 outputs. Missing outputs of the last
// tile, and missing k up to k_padded, are zeros.
//
//   f32   [tile][k][64]
//   bf16  [tile][k/2][64][2]
//   int8  [tile][k/4][64][4]           signed, -127 ... 127
//   int4  [tile][k/8][64][4 bytes]     byte i: k+i in the low nibble, k+4+i in the high one; value + 8
//
//   bf12  [tile]: CodedHead, [k/2][kCodedLineBytes], exceptions: bf16 without loss, below
//
// Scales (int8, int4): bf16, [tile][group of k][64]; one group if `group` is 0 (per output). The last
// group may be shorter. k_padded is a multiple of 8.
struct PackedWeight {
    WeightFormat format;
    int32_t group;  // of k that share a scale; 0: all
    int64_t n, k;
    int64_t k_padded;
    const uint8_t* data;  // 64-byte aligned
    const uint16_t* scales;  // 64-byte aligned; nullptr for f32, bf16 and bf12
};

inline int64_t num_tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t pad8(int64_t k) { return (k + 7) / 8 * 8; }
inline int64_t num_groups(int64_t k, int32_t group) {
    return group == 0 ? 1 : (k + group - 1) / group;
}

// bf12 keeps bf16 numbers in 12 bits, and every bit of them. A number's low byte (the last bit of its
// exponent, and the mantissa) stays as it is. Its high byte (the sign, and the exponent without its
// last bit) becomes 4 bits, an index into the 16 high bytes that the tile's head lists: those of the 8
// most frequent exponents, as weights of one layer have few (Zhang et al., 2025, "70% Size, 100%
// Accuracy: DFloat11", measure 2.6 bits of information in 8). Numbers with another exponent are
// exceptions, kept whole at the tile's end by their place in it, ascending.
//
// A line is 2 of k for 64 outputs, 128 numbers in bf16's order, in 4 chunks of 32. Number i of a chunk
// has place p = coded_place(i), so that interleaving low and high bytes within 16 bytes, as vector
// instructions do, gives two runs of 16 numbers.
//
//   bytes   0 ... 127   low bytes: chunk c's number at 32 c + p
//   bytes 128 ... 191   codes: chunks 0 and 1 in the low and high nibble of byte 128 + p, then 2 and 3
inline constexpr int64_t kCodedLineBytes = 192;
inline constexpr int64_t kLineNumbers = 128;

struct CodedHead {
    uint8_t high_bytes[16];  // + with codes 0 ... 7, - with 8 ... 15
    int32_t num_exceptions;
    uint8_t unused[44];
};

struct CodedException {
    int32_t place;  // line * 128 + number
    uint16_t bits, unused;
};

inline constexpr int coded_place(int number) {
    return number / 8 % 2 * 16 + number / 16 * 8 + number % 8;
}
inline int64_t max_exceptions(int64_t lines) { return lines / 2 + 8; }
inline int64_t coded_tile_bytes(int64_t lines) {
    const int64_t exceptions = max_exceptions(lines) * (int64_t)sizeof(CodedException);
    return (int64_t)sizeof(CodedHead) + lines * kCodedLineBytes + (exceptions + 63) / 64 * 64;
}

// One layer's KV. A block holds block_size slots of every KV head; where in it a number lies is the
// kernels' own business, but all of one (block, head) lies together, and is 64-byte aligned.
struct KvLayer {
    uint8_t* data;  // [num_blocks][block_bytes]
    KvFormat format;
    int32_t block_size, num_kv_heads, head_dim;
    int64_t block_bytes;
};

// One step's requests, as in backends/backend.py: T tokens of R requests, concatenated.
struct StepView {
    int64_t num_tokens, num_requests, max_blocks;
    const int32_t* positions;  // [T]
    const int32_t* slots;  // [T]
    const int32_t* query_starts;  // [R + 1]
    const int32_t* context_lens;  // [R]
    const int32_t* block_tables;  // [R, max_blocks]
};

struct AttentionArgs {
    const float* q;  // [T, ldq], heads side by side
    int64_t ldq;
    float* out;  // [T, ldo]
    int64_t ldo;
    KvLayer kv;
    int32_t num_heads;
    float scale;
    int32_t window;  // keys that a query sees, itself included; 0: all
    float softcap;  // 0: none
};

// A part of one step's attention: some consecutive queries of one request, one KV head (with all query
// heads that read it), and one split of absolute positions, or all of them. Whoever runs items in any
// order on any threads gets the same bits.
struct AttentionItem {
    int32_t request, kv_head;
    int32_t row_begin, row_end;  // of the T rows
    int32_t split_begin, split_end;  // splits (of kSplit positions) that this item covers
    int32_t partial;  // -1: writes `out` itself; else covers one split, and its partial results are
    // places partial ... partial + row_end - row_begin
    int32_t cost;  // roughly, in multiply-adds / 1024
};

// A part of what a step tells of its attention: the weights that some consecutive queries of one
// request give, with the query heads that read one KV head, to positions begin ... end.
struct LookItem {
    int32_t request, kv_head;
    int32_t row_begin, row_end;  // of the T rows
    int32_t begin, end;
};

inline constexpr int32_t kSplit = 512;  // positions: attention restarts its running maximum there

struct Kernels {
    const char* name;  // "baseline", "avx2", "avx512_vnni", "avx512_bf16", "neon_dotprod"

    // -- linear (kernels/linear.h) --------------------------------------------------------------
    // Rows are first brought into the form that the weight's format is multiplied with (rounded to
    // bf16, quantized to int8 per group with sums), row by row; the form is the instruction set's own.
    size_t (*prepared_row_bytes)(const PackedWeight* w);  // a multiple of 64
    void (*prepare_rows)(const PackedWeight* w, const float* x, int64_t ldx, int64_t rows,
                         uint8_t* prepared);
    // out[:, 64 t ... ] of the tiles tile_begin ... tile_end = prepared rows . weight^T (+ bias)
    // (+ out, if accumulate). Writes n columns, not the padding.
    void (*linear)(const PackedWeight* w, const uint8_t* prepared, int64_t rows, int64_t tile_begin,
                   int64_t tile_end, float* out, int64_t ldo, const float* bias, bool accumulate);
    // one row of the weight as fp32 (embedding of tied or packed weights): out[0 ... k)
    void (*unpack_row)(const PackedWeight* w, int64_t row, float* out);

    // -- rows (kernels/rows.h) -------------------------------------------------------------------
    // x, out: [rows, width] with leading dimensions; in place is allowed.
    void (*rms_norm)(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows,
                     int64_t width, int64_t group, const float* weight, float offset, float eps);
    // gate = x[:, :width], up = x[:, width:2 width]
    void (*gated_act)(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows,
                      int64_t width, Activation kind);
    void (*add)(const float* x, int64_t ldx, const float* y, int64_t ldy, float* out, int64_t ldo,
                int64_t rows, int64_t width);
    void (*scale)(float* x, int64_t ldx, int64_t rows, int64_t width, float factor);
    void (*soft_cap)(float* x, int64_t ldx, int64_t rows, int64_t width, float cap);
    // Half-split rotation of each head in place. cos, sin: [rows, rotary_dim / 2], made per step by
    // rope_table (angles rounded to fp32 as in backends/reference).
    void (*rope)(float* x, int64_t ldx, int64_t rows, int64_t num_heads, int64_t head_dim,
                 int64_t rotary_dim, const float* cos, const float* sin);
    // every row is finite
    bool (*all_finite)(const float* x, int64_t count);

    // -- sampling (kernels/sampling.h) -----------------------------------------------------------
    int64_t (*finite_argmax)(const float* row, int64_t size);
    int64_t (*first_to_score)(const float* row, int64_t begin, int64_t size, float largest,
                              float factor, uint64_t key, float lowest, float best);
    // sums[j] += weights (csrc/weight.h) of the logits that are not below lowest[j], j = 0, 1; those
    // below `floor` are below both, or weigh nothing
    void (*weigh)(const float* row, int64_t size, double largest, double inverse, float floor,
                  const double* lowest, uint64_t* sums);
    // of each `block` logits; the last block may be shorter
    void (*block_maxima)(const float* row, int64_t size, int64_t block, float* maxima);

    // -- KV and attention (kernels/attention.h) --------------------------------------------------
    int64_t (*kv_block_bytes)(KvFormat format, int32_t block_size, int32_t num_kv_heads,
                              int32_t head_dim);
    // rows row_begin ... row_end of k and v ([T, ld]) into their slots
    void (*write_kv)(const KvLayer* kv, const int32_t* slots, const float* k, const float* v,
                     int64_t ld, int64_t row_begin, int64_t row_end);
    // Tokens begin ... end: the KV in slot from[i] into slot to[i] too. Values as they are; keys turned
    // by cos and sin, [tokens, half], and stored again, or as they are if `half` is 0. `row` has room
    // for head_dim floats.
    void (*move_kv)(const KvLayer* kv, const int32_t* from, const int32_t* to, int64_t half,
                    const float* cos, const float* sin, int64_t begin, int64_t end, float* row);
    // Tokens begin ... end: the KV in slot slots[i] as fp32, to keys and values, [tokens, heads, dim].
    void (*read_kv)(const KvLayer* kv, const int32_t* slots, int64_t begin, int64_t end,
                    float* keys, float* values);
    size_t (*attention_scratch_bytes)(const AttentionArgs* args);  // per thread
    // floats of one place, a query's partial result; place i begins at partials + i * that
    int64_t (*attention_partial_floats)(const AttentionArgs* args);
    void (*attention)(const AttentionArgs* args, const StepView* step, const AttentionItem* item,
                      float* partials, uint8_t* scratch);
    // joins the partials of one (request, kv head, rows) in ascending split order into `out`: the
    // num_items items from `first` on, which plan_attention put side by side
    void (*attention_merge)(const AttentionArgs* args, const StepView* step,
                            const AttentionItem* first, int32_t num_items, const float* partials);
    // Adds each weight, rounded to a whole number of 2^-20, to its position's place in `sums`; to
    // sums[end - begin], how many (row, head) pairs have weights that are no numbers and count
    // nowhere else. `scratch` as for attention.
    void (*look)(const AttentionArgs* args, const StepView* step, const LookItem* item,
                 int64_t* sums, uint8_t* scratch);
};

// Cuts a step's attention into items (kernels do not depend on it for their result). Items that share
// (request, kv head, rows) stand together, splits ascending: they have partials, one split each, and
// whoever ends the last of them calls attention_merge. Longest first, group by group. `items` nullptr:
// only counts. The same step and arguments give the same items, so layers that differ in nothing but
// their data share a plan.
int64_t plan_attention(const StepView& step, const AttentionArgs& args, int32_t num_threads,
                       AttentionItem* items);
// Places that partial results of these items take, altogether.
int64_t num_partial_places(const AttentionItem* items, int64_t num_items);

const Kernels* baseline_kernels();
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();
#elif defined(__aarch64__)
const Kernels* neon_dotprod_kernels();
#endif

}  // namespace duetto
