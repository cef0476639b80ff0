// Where a key's and a value's numbers lie in a block, how they are written and widened.
//
//   block         [kv head][head bytes], each head's part 64-byte aligned:
//     keys        [head_dim][block_size]   lanes are tokens: scores need no sum over lanes
//     values      [block_size][head_dim]   lanes are head dims
//     scales      [2][block_size] fp32     int8 only: of each token's key, and of its value
//
// int8 is symmetric, -127 ... 127, with the scale max |x| / 127 of that token's row alone, so a
// slot is never written again because of another.
#pragma once

#include "kernels.h"
#include "kernels/simd.h"

namespace duetto {
namespace DUETTO_ISA {

DUETTO_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DUETTO_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
DUETTO_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

DUETTO_INLINE int64_t element_bytes(KvFormat format) {
    return format == KvFormat::f32 ? 4 : format == KvFormat::int8 ? 1 : 2;
}

// Bytes of one head's part of a block, and where in it values and scales begin.
struct HeadLayout {
    int64_t values, scales, bytes;
};
DUETTO_INLINE HeadLayout head_layout(KvFormat format, int64_t block_size, int64_t head_dim) {
    const int64_t half = round_up(block_size * head_dim * element_bytes(format), 64);
    const int64_t scales = format == KvFormat::int8 ? 2 * block_size * (int64_t)sizeof(float) : 0;
    return {half, 2 * half, 2 * half + round_up(scales, 64)};
}

static int64_t kv_block_bytes(KvFormat format, int32_t block_size, int32_t num_kv_heads,
                              int32_t head_dim) {
    return num_kv_heads * head_layout(format, block_size, head_dim).bytes;
}

// -- numbers --------------------------------------------------------------------------------------
// A format's numbers as fp32, exactly, and back, rounded to nearest, ties to even. `narrow` takes
// up to kPiece numbers; int8 keeps them in steps of `scale`.

inline constexpr int kPiece = 64;

DUETTO_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
DUETTO_INLINE float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// fp16 numbers sit 112 powers of two below where fp32 reads their bits; the product is exact, also
// for subnormals. Infinity and NaN come out as 2^16 and above: their exponent is set.
DUETTO_INLINE vf f16_bits_to_f32(vu h) {
    vu magnitude = (h & 0x7fff) << 13;
    vf value = (vf)magnitude * set1(0x1p112f);
    vu special = (vu)(magnitude >= vu{} + 0x0f800000u) & 0x7f800000u;
    return (vf)((vu)value | special | ((h & 0x8000) << 16));
}
DUETTO_INLINE uint16_t f32_to_f16(float x) {
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above: infinity
    if (magnitude < 0x38800000)  // subnormal: adding 0.5 rounds at 2^-24
        return (uint16_t)(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

struct KvF32 {
    typedef float Element;
    static constexpr bool kQuantized = false;
    DUETTO_INLINE vf widen(const float* p) { return load(p); }
    DUETTO_INLINE float widen_one(float x) { return x; }
    DUETTO_INLINE void narrow(const float* x, int64_t count, float, float* to) {
        std::memcpy(to, x, (size_t)count * sizeof(float));
    }
};
struct KvBf16 {
    typedef uint16_t Element;
    static constexpr bool kQuantized = false;
    DUETTO_INLINE vf widen(const uint16_t* p) { return load_bf16(p); }
    DUETTO_INLINE float widen_one(uint16_t x) { return bits_float((uint32_t)x << 16); }
    DUETTO_INLINE void narrow(const float* x, int64_t count, float, uint16_t* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = f32_to_bf16(x[i]);
    }
};
struct KvF16 {
    typedef uint16_t Element;
    static constexpr bool kQuantized = false;
    DUETTO_INLINE vf widen(const uint16_t* p) {
#if defined(__AVX512F__) && !defined(DUETTO_EMULATE_512)
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && !defined(DUETTO_EMULATE_512)
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
        return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
        vh h;
        std::memcpy(&h, p, sizeof h);
        return f16_bits_to_f32(__builtin_convertvector(h, vu));
#endif
    }
    DUETTO_INLINE float widen_one(uint16_t x) { return f16_bits_to_f32(vu{} + x)[0]; }
    DUETTO_INLINE void narrow(const float* x, int64_t count, float, uint16_t* to) {
        int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128((__m128i*)(to + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < count; ++i) to[i] = f32_to_f16(x[i]);
    }
};
struct KvInt8 {
    typedef int8_t Element;
    static constexpr bool kQuantized = true;
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    DUETTO_INLINE vf widen(const int8_t* p) {
#if defined(__AVX512F__) && !defined(DUETTO_EMULATE_512)
        return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && !defined(DUETTO_EMULATE_512)
        return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
        Bytes bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
    }
    DUETTO_INLINE float widen_one(int8_t x) { return (float)x; }
    DUETTO_INLINE void narrow(const float* x, int64_t count, float scale, int8_t* to) {
        const float divisor = scale > 0 ? scale : 1;
        for (int64_t i = 0; i < count; ++i) {  // adding 1.5 * 2^23 rounds to an integer
            const float steps = scale == scale ? x[i] / divisor : 0;
            to[i] = (int8_t)((steps + 12582912.0f) - 12582912.0f);
        }
    }
};

// -- writing --------------------------------------------------------------------------------------

// What one step of an int8 row is worth; NaN, which attention will find, if the row is not finite.
DUETTO_INLINE float row_scale(const float* row, int64_t head_dim) {
    vi largest = {};  // magnitudes order as their bits do, with infinity and NaN on top
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const vf x = head_dim - d >= kLanes ? load(row + d) : load_first(row + d, head_dim - d);
        const vi bits = (vi)x & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    int32_t top = 0;
    for (int lane = 0; lane < kLanes; ++lane) top = largest[lane] > top ? largest[lane] : top;
    return top < 0x7f800000 ? bits_float((uint32_t)top) / 127.0f : bits_float(0x7fc00000);
}

// One token's row of one head into its places, `stride` elements apart. Returns its scale.
template <typename Format>
DUETTO_INLINE float write_row(const float* row, int64_t head_dim, typename Format::Element* to,
                              int64_t stride) {
    const float scale = Format::kQuantized ? row_scale(row, head_dim) : 1;
    for (int64_t d = 0; d < head_dim; d += kPiece) {
        const int64_t count = min64(kPiece, head_dim - d);
        if (stride == 1) {
            Format::narrow(row + d, count, scale, to + d);
            continue;
        }
        typename Format::Element piece[kPiece];
        Format::narrow(row + d, count, scale, piece);
        for (int64_t i = 0; i < count; ++i) to[(d + i) * stride] = piece[i];
    }
    return scale;
}

template <typename Format>
static void write_rows(const KvLayer& kv, const int32_t* slots, const float* k, const float* v,
                       int64_t ld, int64_t row_begin, int64_t row_end) {
    typedef typename Format::Element Element;
    const HeadLayout layout = head_layout(kv.format, kv.block_size, kv.head_dim);
    for (int64_t row = row_begin; row < row_end; ++row) {
        const int64_t block = slots[row] / kv.block_size, slot = slots[row] % kv.block_size;
        for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
            uint8_t* base = kv.data + block * kv.block_bytes + head * layout.bytes;
            const int64_t column = row * ld + head * kv.head_dim;
            const float key_scale =
                write_row<Format>(k + column, kv.head_dim, (Element*)base + slot, kv.block_size);
            const float value_scale = write_row<Format>(
                v + column, kv.head_dim, (Element*)(base + layout.values) + slot * kv.head_dim, 1);
            if (!Format::kQuantized) continue;
            float* scales = (float*)(base + layout.scales);
            scales[slot] = key_scale;
            scales[kv.block_size + slot] = value_scale;
        }
    }
}

static void write_kv(const KvLayer* kv, const int32_t* slots, const float* k, const float* v,
                     int64_t ld, int64_t row_begin, int64_t row_end) {
    switch (kv->format) {
        case KvFormat::f32:
            return write_rows<KvF32>(*kv, slots, k, v, ld, row_begin, row_end);
        case KvFormat::f16:
            return write_rows<KvF16>(*kv, slots, k, v, ld, row_begin, row_end);
        case KvFormat::bf16:
            return write_rows<KvBf16>(*kv, slots, k, v, ld, row_begin, row_end);
        case KvFormat::int8:
            return write_rows<KvInt8>(*kv, slots, k, v, ld, row_begin, row_end);
    }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
