// Rows as the weights' formats are multiplied with them: copied, rounded to bf16, or quantized to int8
// per group. A prepared row is its words (linear_formats.h), then for int8 and int4 a RowGroup for each
// group of k.
#pragma once

#include "kernels/coded.h"

namespace duetto {
namespace DUETTO_ISA {

struct RowGroup {
    float scale;
    int32_t
        start;  // what the group's accumulators start at (kPaired: with unpacked words, else at 0)
};

// Where the parts of a prepared row lie, in bytes.
struct RowLayout {
    int64_t groups, size;
};

template <class F>
inline constexpr bool kIsQuantized = F::kRow == Row::s8 || F::kRow == Row::s16;

DUETTO_INLINE int64_t up_to_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class F>
DUETTO_INLINE RowLayout row_layout(const PackedWeight& w) {
    constexpr int64_t bytes_per_k = F::kRow == Row::f32 ? 4 : F::kRow == Row::s8 ? 1 : 2;
    RowLayout at;
    at.groups = at.size = up_to_64(w.k_padded * bytes_per_k + 64);  // 64: whole vectors are stored
    if constexpr (kIsQuantized<F>) {
        at.size += up_to_64(num_groups(w.k, w.group) * (int64_t)sizeof(RowGroup));
    }
    // an odd number of cache lines, so that rows do not all fall into the same sets
    if (at.size / 64 % 2 == 0) at.size += 64;
    return at;
}

typedef int64_t vl __attribute__((vector_size(kLanes * 4)));  // two lanes

// The two words of each four numbers, in the first two of their four lanes.
DUETTO_INLINE vl s16_words(vi q) {
    vl other = {};  // lanes 2, 3 of each four in 0, 1
    for (int i = 0; i < kLanes / 2; i++) other[i] = i ^ 1;
    other = __builtin_shuffle((vl)q, other);
    return (vl)((q & 0xffff) | ((vi)other << 16));
}

// Words of kLanes quantized numbers; returns how many bytes they are.
template <Row kRow>
DUETTO_INLINE int store_quantized(uint8_t* out, vi q) {
    if constexpr (kRow == Row::s8) {
        vb first = {};  // bytes, the lowest of each four lanes' in that four's first lane
        for (int i = 0; i < kLanes * 4; i++) first[i] = (int8_t)(i / 16 * 16 + i % 4 * 4);
        const vi words = (vi)__builtin_shuffle((vb)q, first);
        for (int i = 0; i < kLanes / 4; i++) {
            const int32_t word = words[4 * i];
            std::memcpy(out + 4 * i, &word, 4);
        }
        return kLanes;
    } else {
        const vl words = s16_words(q);
        for (int i = 0; i < kLanes / 4; i++) {
            const int64_t two = words[2 * i];
            std::memcpy(out + 8 * i, &two, 8);
        }
        return kLanes * 2;
    }
}

// What each four numbers add to a group's start, in any lanes.
template <class F>
DUETTO_INLINE vi start_of(vi q) {
    if constexpr (F::kPaired) {
        // q[i] q[i + 1] in even lanes: the upper halves of one factor are zero
        const vi next = (vi)(((vl)q >> 32) & 0xffff);
        return -dot_s16(vi{}, q, next);
    } else {
        return q * -F::kOffset;
    }
}

// q = round(x * 127 / max |x|), ties to even; returns the group's start. A group with a NaN or an
// infinity gets the scale NaN, so that its row, and no other, becomes NaN.
template <class F>
static int32_t quantize_group(const float* x, int64_t count, uint8_t* out, float* scale) {
    const vu magnitude = (vu)set1_int(0x7fffffff);
    vu top = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const vu bits = (vu)load(x + i) & magnitude;
        top = bits > top ? bits : top;  // as integers: NaN is above infinity, above all numbers
    }
    if (i < count) {
        const vu bits = (vu)load_first(x + i, count - i) & magnitude;
        top = bits > top ? bits : top;
    }
    uint32_t top_bits = 0;
    for (int lane = 0; lane < kLanes; lane++)
        top_bits = top[lane] > top_bits ? top[lane] : top_bits;
    float amax, inverse;
    std::memcpy(&amax, &top_bits, 4);
    if (top_bits >= 0x7f800000u) {
        *scale = __builtin_nanf("");
        std::memset(out, 0, (size_t)count * (F::kRow == Row::s8 ? 1 : 2));
        return 0;
    }
    if (amax < 1e-30f) {  // so small that 127 / amax may be infinite: zero
        *scale = inverse = 0;
    } else {
        *scale = amax / 127.0f;
        inverse = 127.0f / amax;
    }
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
    const float shift = 12582912.0f;
    const vi shift_bits = (vi)set1(shift);
    vi sum = {};
    for (i = 0; i + kLanes <= count; i += kLanes) {
        const vi q = (vi)(load(x + i) * inverse + shift) - shift_bits;
        sum += start_of<F>(q);
        out += store_quantized<F::kRow>(out, q);
    }
    if (i < count) {
        const vi q = (vi)(load_first(x + i, count - i) * inverse + shift) - shift_bits;
        sum += start_of<F>(q);
        store_quantized<F::kRow>(out, q);
    }
    int32_t total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += sum[lane];
    return total;
}

template <class F>
static void prepare(const PackedWeight& w, const float* x, uint8_t* out) {
    const RowLayout at = row_layout<F>(w);
    if constexpr (F::kRow == Row::f32) {
        if (w.k > 0) std::memcpy(out, x, (size_t)w.k * 4);
        std::memset(out + w.k * 4, 0, (size_t)(w.k_padded - w.k) * 4);
    } else if constexpr (F::kRow == Row::bf16) {
        uint16_t* p = (uint16_t*)out;
        for (int64_t i = 0; i < w.k; i++) p[i] = f32_to_bf16(x[i]);
        for (int64_t i = w.k; i < w.k_padded; i++) p[i] = 0;
    } else {
        constexpr int64_t bytes_per_k = F::kRow == Row::s8 ? 1 : 2;
        const int64_t groups = num_groups(w.k, w.group), group = w.group == 0 ? w.k : w.group;
        RowGroup* row_groups = (RowGroup*)(out + at.groups);
        // zeros behind the last numbers, before the last vector that is stored over them
        std::memset(out + w.k / 8 * 8 * bytes_per_k, 0,
                    (size_t)(at.groups - w.k / 8 * 8 * bytes_per_k));
        for (int64_t g = 0; g < groups; g++) {
            const int64_t k0 = g * group, count = w.k - k0 < group ? w.k - k0 : group;
            row_groups[g].start =
                quantize_group<F>(x + k0, count, out + k0 * bytes_per_k, &row_groups[g].scale);
        }
    }
}

DUETTO_INLINE float from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// One number of the weight, before its scale.
template <class F>
DUETTO_INLINE float packed_number(const uint8_t* tile, int64_t output, int64_t k);
template <>
float packed_number<F32>(const uint8_t* tile, int64_t output, int64_t k) {
    float x;
    std::memcpy(&x, tile + (k * kTile + output) * 4, 4);
    return x;
}
template <>
float packed_number<Bf16>(const uint8_t* tile, int64_t output, int64_t k) {
    uint16_t half;
    std::memcpy(&half, tile + (k / 2 * kTile + output) * 4 + k % 2 * 2, 2);
    return from_bf16(half);
}
template <>
float packed_number<Bf12>(const uint8_t* tile, int64_t output, int64_t k) {  // if no exception
    const uint8_t* line = tile + sizeof(CodedHead) + k / 2 * kCodedLineBytes;
    return from_bf16(coded_number(*(const CodedHead*)tile, line, (int)(output * 2 + k % 2)));
}
template <>
float packed_number<Int8>(const uint8_t* tile, int64_t output, int64_t k) {
    return (float)(int8_t)tile[(k / 4 * kTile + output) * 4 + k % 4];
}
template <>
float packed_number<Int4>(const uint8_t* tile, int64_t output, int64_t k) {
    const int byte = tile[(k / 8 * kTile + output) * 4 + k % 4];
    return (float)((k % 8 < 4 ? byte & 15 : byte >> 4) - 8);
}

template <class F>
DUETTO_INLINE int64_t tile_bytes(int64_t lines) {
    return kIsCoded<F> ? coded_tile_bytes(lines) : lines * kTile * 4;
}

template <class F>
static void unpack(const PackedWeight& w, int64_t row, float* out) {
    const int64_t tile_index = row / kTile, output = row % kTile;
    const int64_t lines = w.k_padded / F::kLineK;
    const uint8_t* tile = w.data + tile_index * tile_bytes<F>(lines);
    const int64_t groups = num_groups(w.k, w.group), group = w.group == 0 ? w.k : w.group;
    for (int64_t k = 0; k < w.k; k++) {
        out[k] = packed_number<F>(tile, output, k);
        if constexpr (kIsQuantized<F>) {
            out[k] *= from_bf16(w.scales[(tile_index * groups + k / group) * kTile + output]);
        }
    }
    if constexpr (kIsCoded<F>) {
        const CodedException* e = exceptions_of(tile, lines);
        for (int i = 0; i < ((const CodedHead*)tile)->num_exceptions; i++) {
            const int64_t k = e[i].place / kLineNumbers * 2 + e[i].place % 2;
            if (e[i].place % kLineNumbers / 2 == output && k < w.k) out[k] = from_bf16(e[i].bits);
        }
    }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
