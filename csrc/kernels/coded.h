// bf12 (kernels.h): bf16 in 12 bits, decoded line by line before it is multiplied as bf16 is, so that
// every result has the same bits. A byte shuffle is what makes it fast; sets without one are slow.
#pragma once

#include <type_traits>

#include "kernels/linear_formats.h"

namespace duetto {
namespace DUETTO_ISA {

struct Bf12 : Bf16 {};

template <class F>
inline constexpr bool kIsCoded = std::is_same_v<F, Bf12>;

// One number of a coded line, if it is no exception.
DUETTO_INLINE uint16_t coded_number(const CodedHead& head, const uint8_t* line, int number) {
    const int chunk = number / 32, place = coded_place(number % 32);
    const int codes = line[128 + chunk / 2 * 32 + place];
    const int high = head.high_bytes[chunk % 2 == 0 ? codes & 15 : codes >> 4];
    return (uint16_t)(high << 8 | line[chunk * 32 + place]);
}

#if defined(__AVX2__)
DUETTO_INLINE __m256i coded_table(const CodedHead& head) {
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)head.high_bytes));
}

// 32 numbers of a coded line, in two vectors.
DUETTO_INLINE void decode_chunk(__m256i table, const uint8_t* line, int chunk, __m256i (&words)[2]) {
    __m256i codes = _mm256_loadu_si256((const __m256i*)(line + 128 + chunk / 2 * 32));
    if (chunk % 2 == 1) codes = _mm256_srli_epi16(codes, 4);
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
    const __m256i low = _mm256_loadu_si256((const __m256i*)(line + chunk * 32));
    words[0] = _mm256_unpacklo_epi8(low, high);
    words[1] = _mm256_unpackhi_epi8(low, high);
}
#endif

// Lines of bf12 as lines of bf16, without exceptions.
DUETTO_INLINE void decode_lines(const CodedHead& head, const uint8_t* coded, int64_t lines,
                                uint8_t* out) {
#if defined(__AVX2__)
    const __m256i table = coded_table(head);
#pragma GCC unroll 1
    for (int64_t line = 0; line < lines; line++) {
#pragma GCC unroll 4
        for (int chunk = 0; chunk < 4; chunk++) {
            __m256i words[2];
            decode_chunk(table, coded, chunk, words);
            std::memcpy(out + chunk * 64, words, 64);
        }
        coded += kCodedLineBytes;
        out += kTile * 4;
    }
#elif defined(__aarch64__)
    const uint8x16_t table = vld1q_u8(head.high_bytes);
    for (int64_t line = 0; line < lines; line++) {
        for (int half = 0; half < 8; half++) {  // of chunks: places 0 ... 15, then 16 ... 31
            const int chunk = half / 2, part = half % 2;
            uint8x16_t codes = vld1q_u8(coded + 128 + chunk / 2 * 32 + part * 16);
            codes = chunk % 2 == 1 ? vshrq_n_u8(codes, 4) : vandq_u8(codes, vdupq_n_u8(15));
            const uint8x16_t high = vqtbl1q_u8(table, codes);
            const uint8x16_t low = vld1q_u8(coded + chunk * 32 + part * 16);
            vst1q_u8(out + chunk * 64 + part * 16, vzip1q_u8(low, high));
            vst1q_u8(out + chunk * 64 + part * 16 + 32, vzip2q_u8(low, high));
        }
        coded += kCodedLineBytes;
        out += kTile * 4;
    }
#else
    for (int64_t line = 0; line < lines; line++) {
        for (int i = 0; i < kLineNumbers; i++) {
            const uint16_t bits = coded_number(head, coded, i);
            std::memcpy(out + 2 * i, &bits, 2);
        }
        coded += kCodedLineBytes;
        out += kTile * 4;
    }
#endif
}

DUETTO_INLINE const CodedException* exceptions_of(const uint8_t* tile, int64_t lines) {
    return (const CodedException*)(tile + sizeof(CodedHead) + lines * kCodedLineBytes);
}

// Lines `first` and on of a coded tile, exceptions and all.
DUETTO_INLINE void decode_block(const uint8_t* tile, int64_t tile_lines, int64_t first,
                                int64_t lines, uint8_t* out) {
    const CodedHead& head = *(const CodedHead*)tile;
    const uint8_t* coded = tile + sizeof(CodedHead);
    decode_lines(head, coded + first * kCodedLineBytes, lines, out);
    const CodedException* all = exceptions_of(tile, tile_lines);
    const int64_t place = first * kLineNumbers, end = place + lines * kLineNumbers;
    int32_t begin = 0, behind = head.num_exceptions;  // the first that is not before `place`
    while (begin < behind) {
        const int32_t middle = (begin + behind) / 2;
        if (all[middle].place < place) {
            begin = middle + 1;
        } else {
            behind = middle;
        }
    }
    for (; begin < head.num_exceptions && all[begin].place < end; begin++) {
        std::memcpy(out + (all[begin].place - place) * 2, &all[begin].bits, 2);
    }
}

#if defined(__AVX2__)
// How far ahead of what it decodes the kernel for one row fetches memory, in bytes (measured).
inline constexpr int64_t kCodedAhead = 1536;

// sum + the words of 8 outputs times a row's two numbers, as Bf16::dot adds them lane by lane. 8 lanes
// on wider machines too: they keep up with memory.
DUETTO_INLINE void add_products(__m256& sum, __m256i words, const uint8_t* a) {
#if defined(__AVX512BF16__)
    const __m256i x = (__m256i)_mm256_broadcast_ss((const float*)a);
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(words), "v"(x));
#else
    __m256i x0, x1;
    if constexpr (Bf12::kRow == Row::bf16) {  // emulated: products of two bf16 are exact
        const __m256i pair = (__m256i)_mm256_broadcast_ss((const float*)a);
        x0 = _mm256_slli_epi32(pair, 16);
        x1 = _mm256_and_si256(pair, _mm256_set1_epi32(-65536));
    } else {
        x0 = (__m256i)_mm256_broadcast_ss((const float*)a);
        x1 = (__m256i)_mm256_broadcast_ss((const float*)a + 1);
    }
    const __m256i w1 = _mm256_and_si256(words, _mm256_set1_epi32(-65536));
    sum = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(words, 16), (__m256)x0, sum);
    sum = _mm256_fmadd_ps((__m256)w1, (__m256)x1, sum);
#endif
}

// One row times coded lines without exceptions, all outputs at once.
DUETTO_INLINE void multiply_coded(__m256 (&sums)[8], const CodedHead& head, const uint8_t* coded,
                                  const uint8_t* a, int64_t lines) {
    const __m256i table = coded_table(head);
#pragma GCC unroll 1
    for (int64_t line = 0; line < lines; line++) {
        for (int i = 0; i < kCodedLineBytes; i += 64) prefetch(coded + kCodedAhead + i);
#pragma GCC unroll 4
        for (int chunk = 0; chunk < 4; chunk++) {
            __m256i words[2];
            decode_chunk(table, coded, chunk, words);
            add_products(sums[chunk * 2], words[0], a);
            add_products(sums[chunk * 2 + 1], words[1], a);
        }
        coded += kCodedLineBytes;
        a += Bf12::kWords * 4;
    }
}

// One row times a tile, decoded in registers: `out` [64].
static __attribute__((noinline)) void tile_coded(const uint8_t* tile, int64_t lines, const uint8_t* row,
                                                 float* out) {
    constexpr int64_t row_bytes = Bf12::kWords * 4;  // of a line
    const CodedHead& head = *(const CodedHead*)tile;
    const CodedException* exceptions = exceptions_of(tile, lines);
    alignas(64) uint8_t decoded[kTile * 4];
    __m256 sums[8] = {};
    int64_t line = 0;
    for (int32_t e = 0; line < lines;) {
        const bool any = e < head.num_exceptions;
        const int64_t next = any ? exceptions[e].place / kLineNumbers : lines;
        multiply_coded(sums, head, tile + sizeof(CodedHead) + line * kCodedLineBytes,
                       row + line * row_bytes, next - line);
        line = next;
        if (!any) break;
        decode_block(tile, lines, line, 1, decoded);
        const __m256i* words = (const __m256i*)decoded;
        for (int v = 0; v < 8; v++) add_products(sums[v], words[v], row + line * row_bytes);
        line++;
        while (e < head.num_exceptions && exceptions[e].place < line * kLineNumbers) e++;
    }
    for (int v = 0; v < 8; v++) _mm256_storeu_ps(out + v * 8, sums[v]);
}
#endif

}  // namespace DUETTO_ISA
}  // namespace duetto
