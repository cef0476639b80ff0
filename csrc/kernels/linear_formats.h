// How each weight format is multiplied on this instruction set.
//
// A packed tile is a sequence of lines of 256 bytes: 64 outputs with four bytes each. A format
// unpacks a line into kWords words per output, each of which meets one word (four bytes) of the
// prepared row: `dot` adds their product to an accumulator. What a word holds is settled between the
// format and the preparation of rows:
//
//   Row::f32    1 k: a float
//   Row::bf16   2 k: k, k+1, for instructions that multiply pairs of bf16
//   Row::s16    2 k: of four k, (0, 2) is the first word and (1, 3) the second, which is what shifting
//               bytes out of 16-bit lanes gives
//   Row::s8     4 k
//
// kDirectHeight rows at once are multiplied with lines that are unpacked on the way.
// A format that stores w + kOffset leaves kOffset * (sum of the row's group) too much: accumulators
// start at minus that.
//
// kPaired: with unpacked words, two words are multiplied at once by
//   a0 w0 + a1 w1 = (a0 + w1) (a1 + w0) - a0 a1 - w0 w1
// (Winograd, A New Algorithm for Inner Product, 1968): half the multiplications, for additions that run
// on all four ports of a Zen 3 and not on two. Sums of two int8 fit 16 bits, so it is exact; the products
// to subtract are the row's (accumulators start at minus them) and the weight's (from unpacking).
#pragma once

#include "kernels.h"
#include "kernels/simd.h"

namespace duetto {
namespace DUETTO_ISA {

enum class Row { f32, bf16, s16, s8 };

// On AVX2, product and sum are written as one piece of assembly: GCC 12 would rather load and multiply
// for a whole register tile first, and keep accumulators in memory for lack of registers.

// acc + the products of signed 16-bit pairs
DUETTO_INLINE vi dot_s16(vi acc, vi w, vi a) {
#if defined(DUETTO_EMULATE_512)
    for (int i = 0; i < kLanes; i++) {
        acc[i] += ((vs)w)[2 * i] * ((vs)a)[2 * i] + ((vs)w)[2 * i + 1] * ((vs)a)[2 * i + 1];
    }
    return acc;
#elif defined(__AVX512BW__)
    return (vi)((vu)acc + (vu)_mm512_madd_epi16((__m512i)w, (__m512i)a));
#elif defined(__AVX2__)
    vi product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(product)
            : "x"(w), "x"(a));
    return acc;
#elif defined(__SSE2__)
    return (vi)((vu)acc + (vu)_mm_madd_epi16((__m128i)w, (__m128i)a));
#else
    vi even = (((vi)w << 16) >> 16) * (((vi)a << 16) >> 16);
    return acc + even + ((vi)w >> 16) * ((vi)a >> 16);
#endif
}

#if defined(__AVX512VNNI__) || defined(DUETTO_EMULATE_512)
#define DUETTO_DOT_U8 1
// acc + the products of four unsigned bytes of w with four signed ones of a, without saturation
DUETTO_INLINE vi dot_u8(vi acc, vi w, vi a) {
#if defined(DUETTO_EMULATE_512)
    for (int i = 0; i < kLanes * 4; i++) acc[i / 4] += (int)((uint8_t)((vb)w)[i]) * ((vb)a)[i];
#else
    // (as assembly: GCC 12 copies accumulators around its intrinsic)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
#endif
    return acc;
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define DUETTO_DOT_S8 1
DUETTO_INLINE vi dot_s8(vi acc, vi w, vi a) {
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)a);
}
#endif

DUETTO_INLINE vf dot_f32(vf acc, vf w, vf a) {
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__) && !defined(DUETTO_EMULATE_512)
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
    return acc;
#else
    return fma(w, a, acc);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(DUETTO_EMULATE_512)
#define DUETTO_PAIRED 1
// acc + both words' products and the two that are too much
DUETTO_INLINE vi dot_paired(vi acc, vi w0, vi w1, vi a0, vi a1) {
    vi x, y;
    __asm__("vpaddw %4, %5, %1\n\tvpaddw %3, %6, %2\n\tvpmaddwd %1, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(x), "=&x"(y)
            : "x"(w0), "x"(w1), "x"(a0), "x"(a1));
    return acc;
}
#endif

struct F32 {
    typedef vf Acc;
    static constexpr Row kRow = Row::f32;
    static constexpr int kLineK = 1, kWords = 1, kDirectHeight = 6;
    DUETTO_INLINE vi word(vi line, int) { return line; }
    DUETTO_INLINE vf dot(vf acc, vi w, vi a) { return dot_f32(acc, (vf)w, (vf)a); }
};

struct Bf16 {
    typedef vf Acc;
    static constexpr int kLineK = 2;
    static constexpr int kDirectHeight = kLanes == 16 ? 6 : 5;  // unpacking takes registers
#if defined(__AVX512BF16__) || DUETTO_EMULATE_512 == 2
    static constexpr Row kRow = Row::bf16;
    static constexpr int kWords = 1;
    DUETTO_INLINE vi word(vi line, int) { return line; }
    DUETTO_INLINE vf dot(vf acc, vi w, vi a) {
#if defined(DUETTO_EMULATE_512)
        acc = acc + (vf)(w << 16) * (vf)(a << 16);
        return acc + (vf)(w & -65536) * (vf)(a & -65536);
#else
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
        return acc;
#endif
    }
#else
    static constexpr Row kRow = Row::f32;
    static constexpr int kWords = 2;
    DUETTO_INLINE vi word(vi line, int i) { return i == 0 ? line << 16 : line & -65536; }
    DUETTO_INLINE vf dot(vf acc, vi w, vi a) { return dot_f32(acc, (vf)w, (vf)a); }
#endif
};

struct Int8 {
    typedef vi Acc;
    static constexpr int kLineK = 4, kDirectHeight = 6;
#if defined(DUETTO_PAIRED)
    static constexpr bool kPaired = true;
#else
    static constexpr bool kPaired = false;
#endif
    static constexpr bool kNarrow = false;
#if defined(DUETTO_DOT_U8)
    static constexpr Row kRow = Row::s8;
    static constexpr int kWords = 1, kOffset = 128;
    DUETTO_INLINE vi word(vi line, int) { return line ^ (int32_t)0x80808080; }
    DUETTO_INLINE vi dot(vi acc, vi w, vi a) { return dot_u8(acc, w, a); }
#elif defined(DUETTO_DOT_S8)
    static constexpr Row kRow = Row::s8;
    static constexpr int kWords = 1, kOffset = 0;
    DUETTO_INLINE vi word(vi line, int) { return line; }
    DUETTO_INLINE vi dot(vi acc, vi w, vi a) { return dot_s8(acc, w, a); }
#else
    static constexpr Row kRow = Row::s16;
    static constexpr int kWords = 2, kOffset = 0;
    DUETTO_INLINE vi word(vi line, int i) {
        return i == 0 ? (vi)(((vs)line << 8) >> 8) : (vi)((vs)line >> 8);
    }
    DUETTO_INLINE vi dot(vi acc, vi w, vi a) { return dot_s16(acc, w, a); }
#endif
};

struct Int4 {
    typedef vi Acc;
    static constexpr int kLineK = 8, kOffset = 8, kDirectHeight = 6;
    static constexpr bool kPaired = false;
#if defined(DUETTO_DOT_U8) || defined(DUETTO_DOT_S8) || defined(__AVX2__)
    static constexpr Row kRow = Row::s8;
    static constexpr int kWords = 2;
    DUETTO_INLINE vi word(vi line, int i) {
        return (i == 0 ? line : (vi)((vu)line >> 4)) & 0x0f0f0f0f;
    }
#if defined(DUETTO_DOT_U8)
    static constexpr bool kNarrow = false;
    DUETTO_INLINE vi dot(vi acc, vi w, vi a) { return dot_u8(acc, w, a); }
#elif defined(DUETTO_DOT_S8)
    static constexpr bool kNarrow = false;
    DUETTO_INLINE vi dot(vi acc, vi w, vi a) { return dot_s8(acc, w, a); }
#else
    // Pairs are summed in 16 bits: 8 sums of 2 * 15 * 127 fit, then they must be widened.
    static constexpr bool kNarrow = true;
    static constexpr int kNarrowWords = 8;
    DUETTO_INLINE vi dot(vi acc, vi w, vi a) {
        vi product;
        __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
                : "+x"(acc), "=&x"(product)
                : "x"(w), "x"(a));
        return acc;
    }
    DUETTO_INLINE vi widen(vi acc, vi narrow) { return dot_s16(acc, narrow, set1_int(0x00010001)); }
#endif
#else
    static constexpr Row kRow = Row::s16;
    static constexpr int kWords = 4;
    static constexpr bool kNarrow = false;
    DUETTO_INLINE vi word(vi line, int i) {  // bytes 0 and 2, then 1 and 3; low nibbles first
        return (vi)((vu)line >> ((i & 1) * 8 + (i >> 1) * 4)) & 0x000f000f;
    }
    DUETTO_INLINE vi dot(vi acc, vi w, vi a) { return dot_s16(acc, w, a); }
#endif
};

}  // namespace DUETTO_ISA
}  // namespace duetto
