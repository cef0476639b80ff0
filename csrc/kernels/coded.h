// bf12 (kernels.h): bf16 in 12 bits, decoded in registers for few rows and a block of lines at a time for
// many, then multiplied in bf16's order, so that every result has the same bits. A byte shuffle is what makes it fast; sets without one are slow.
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

// Two chunks of a coded line share their bytes of codes: the words of 32 outputs are decoded at once, in
// kPairVecs vectors, output o of the line in place coded_word(o) of its 64 words. (16 lanes: two runs of 8
// outputs, as interleaving bytes within 16 bytes leaves them; putting them in order would take as many
// shuffles again.)
inline constexpr int kPairVecs = 32 / kLanes;
DUETTO_INLINE int coded_word(int output) {
    if (kLanes < 16) return output;
    return output / 32 * 32 + output / 8 % 2 * 16 + output / 16 % 2 * 8 + output % 8;
}

#if defined(__AVX512BW__)
typedef __m512i CodedTable;
DUETTO_INLINE CodedTable coded_table(const CodedHead& head) {
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)head.high_bytes));
}
DUETTO_INLINE void decode_pair(CodedTable table, const CodedHead&, const uint8_t* line, int pair,
                               vi (&words)[kPairVecs]) {
    const __m512i shift = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    const __m256i packed = _mm256_loadu_si256((const __m256i*)(line + 128 + pair * 32));
    const __m512i codes = _mm512_srlv_epi64(_mm512_broadcast_i64x4(packed), shift);
    const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
    const __m512i low = _mm512_loadu_si512(line + pair * 64);
    words[0] = (vi)_mm512_unpacklo_epi8(low, high);
    words[1] = (vi)_mm512_unpackhi_epi8(low, high);
}
#elif defined(__AVX2__) && !defined(DUETTO_EMULATE_512)
typedef __m256i CodedTable;
DUETTO_INLINE CodedTable coded_table(const CodedHead& head) {
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)head.high_bytes));
}
DUETTO_INLINE void decode_pair(CodedTable table, const CodedHead&, const uint8_t* line, int pair,
                               vi (&words)[kPairVecs]) {
    const __m256i packed = _mm256_loadu_si256((const __m256i*)(line + 128 + pair * 32));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m256i codes = i == 0 ? packed : _mm256_srli_epi16(packed, 4);
        const __m256i high =
            _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
        const __m256i low = _mm256_loadu_si256((const __m256i*)(line + pair * 64 + i * 32));
        words[2 * i] = (vi)_mm256_unpacklo_epi8(low, high);
        words[2 * i + 1] = (vi)_mm256_unpackhi_epi8(low, high);
    }
}
#else
struct CodedTable {};
DUETTO_INLINE CodedTable coded_table(const CodedHead&) { return {}; }
DUETTO_INLINE void decode_pair(CodedTable, const CodedHead& head, const uint8_t* line, int pair,
                               vi (&words)[kPairVecs]) {
    int32_t places[32];
    for (int output = 0; output < 32; output++) {
        const int number = pair * 64 + output * 2;
        places[coded_word(output)] =
            coded_number(head, line, number) | coded_number(head, line, number + 1) << 16;
    }
    std::memcpy(words, places, sizeof places);
}
#endif

// Lines of bf12 as lines of bf16, without exceptions.
DUETTO_INLINE void decode_lines(const CodedHead& head, const uint8_t* coded, int64_t lines,
                                uint8_t* out) {
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(DUETTO_EMULATE_512))
    const CodedTable table = coded_table(head);
#pragma GCC unroll 1
    for (int64_t line = 0; line < lines; line++) {
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++) {
            vi words[kPairVecs];
            decode_pair(table, head, coded, pair, words);
#if defined(__AVX512BW__)  // (stored whole: what is stored in halves cannot be forwarded to a load)
            const __m512i x = (__m512i)words[0], y = (__m512i)words[1];
            words[0] = (vi)_mm512_shuffle_i64x2(x, y, 0x44);
            words[1] = (vi)_mm512_shuffle_i64x2(x, y, 0xee);
#endif
#pragma GCC unroll 4
            for (int v = 0; v < kPairVecs; v++)
                store_int(out + pair * 128 + v * kLanes * 4, words[v]);
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

// Rows that coded lines are multiplied with as they are decoded in registers, at most; of more rows a
// block of lines is decoded first. (AVX2 has registers for one; elsewhere decoding is too slow.)
#if defined(__AVX512F__) || defined(DUETTO_EMULATE_512)
inline constexpr int kCodedRows = 12;
#elif defined(__AVX2__)
inline constexpr int kCodedRows = 1;
#else
inline constexpr int kCodedRows = 0;
#endif
// How far ahead of what it decodes memory is fetched, in bytes, and the lines that pass at a time where
// one pass has registers for half of the outputs (measured).
inline constexpr int64_t kCodedAhead = kLanes == 16 ? 4096 : 1536, kCodedLines = 64;

// acc[r][v] += one line's words of P pairs of chunks times R rows' words.
template <int R, int V>
DUETTO_INLINE void multiply_decoded(vf (&acc)[R][V], int first, const vi (&words)[kPairVecs],
                                    const uint8_t* a, int64_t lda) {
#pragma GCC unroll 2
    for (int i = 0; i < Bf12::kWords; i++) {
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const vi x = broadcast_word(a + r * lda + i * 4);
#pragma GCC unroll 4
            for (int v = 0; v < kPairVecs; v++) {
                acc[r][first + v] = Bf12::dot(acc[r][first + v], Bf12::word(words[v], i), x);
            }
        }
    }
}

// R rows times coded lines without exceptions, P pairs of chunks from `pair` on. sums: [R][64], places as
// coded_word has them.
template <int R, int P>
DUETTO_INLINE void multiply_coded(float* sums, const CodedHead& head, const uint8_t* coded,
                                  int pair, const uint8_t* a, int64_t lda, int64_t lines) {
    constexpr int V = P * kPairVecs;
    const CodedTable table = coded_table(head);
    sums += pair * 32;
    vf acc[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] = load(sums + r * kTile + v * kLanes);
    }
#pragma GCC unroll 1
    for (int64_t line = 0; line < lines; line++) {
        if (pair == 0) {
            for (int i = 0; i < kCodedLineBytes; i += 64) prefetch(coded + kCodedAhead + i);
        }
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
            vi words[kPairVecs];
            decode_pair(table, head, coded, pair + p, words);
            multiply_decoded<R, V>(acc, p * kPairVecs, words, a, lda);
        }
        coded += kCodedLineBytes;
        a += Bf12::kWords * 4;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(sums + r * kTile + v * kLanes, acc[r][v]);
    }
}

// R rows times one line with exceptions: the first of them, and those that are not of this line.
template <int R>
DUETTO_INLINE const CodedException* multiply_exceptions(float* sums, const CodedHead& head,
                                                        const uint8_t* coded, const uint8_t* a,
                                                        int64_t lda, const CodedException* e,
                                                        const CodedException* end) {
    alignas(64) uint16_t numbers[kLineNumbers];
    const int64_t line = e->place / kLineNumbers;
    for (int pair = 0; pair < 2; pair++) {
        vi words[kPairVecs];
        decode_pair(coded_table(head), head, coded, pair, words);
        std::memcpy(numbers + pair * 64, words, sizeof words);
    }
    for (; e < end && e->place / kLineNumbers == line; e++) {
        const int number = e->place % kLineNumbers;
        numbers[coded_word(number / 2) * 2 + number % 2] = e->bits;
    }
    for (int v = 0; v < kTile / kLanes; v++) {
        const vi words = load_int(numbers + v * kLanes * 2);
        for (int r = 0; r < R; r++) {
            float* p = sums + r * kTile + v * kLanes;
            vf sum = load(p);
            for (int i = 0; i < Bf12::kWords; i++) {
                sum = Bf12::dot(sum, Bf12::word(words, i), broadcast_word(a + r * lda + i * 4));
            }
            store(p, sum);
        }
    }
    return e;
}

// R rows, `lda` bytes apart, times a tile that is decoded in registers: out [R][64].
template <int R>
static __attribute__((noinline)) void tile_coded(const uint8_t* tile, int64_t lines,
                                                 const uint8_t* rows, int64_t lda, float* out) {
    constexpr int64_t row_bytes = Bf12::kWords * 4;  // of a line
    constexpr bool whole = kLanes < 16 || R * kTile / kLanes <= 24;  // registers for all outputs
    const CodedHead& head = *(const CodedHead*)tile;
    const uint8_t* coded = tile + sizeof(CodedHead);
    const CodedException* e = exceptions_of(tile, lines);
    const CodedException* const end = e + head.num_exceptions;
    alignas(64) float sums[R * kTile] = {};
    for (int64_t line = 0; line < lines;) {
        const int64_t exception = e < end ? e->place / kLineNumbers : lines;
        int64_t next = exception;
        if (!whole && next - line > kCodedLines) next = line + kCodedLines;
        const uint8_t* from = coded + line * kCodedLineBytes;
        const uint8_t* a = rows + line * row_bytes;
        if constexpr (whole) {
            multiply_coded<R, 2>(sums, head, from, 0, a, lda, next - line);
        } else {
            multiply_coded<R, 1>(sums, head, from, 0, a, lda, next - line);
            multiply_coded<R, 1>(sums, head, from, 1, a, lda, next - line);
        }
        line = next;
        if (line < exception || line == lines) continue;
        e = multiply_exceptions<R>(sums, head, coded + line * kCodedLineBytes,
                                   rows + line * row_bytes, lda, e, end);
        line++;
    }
    for (int r = 0; r < R; r++) {
        for (int output = 0; output < kTile; output += 8) {
            std::memcpy(out + r * kTile + output, sums + r * kTile + coded_word(output), 32);
        }
    }
}

// As many rows as there are, up to kCodedRows.
template <int R>
static void tile_coded_rows(int64_t count, const uint8_t* tile, int64_t lines, const uint8_t* rows,
                            int64_t lda, float* out) {
    if constexpr (R > 0) {
        if (count == R) return tile_coded<R>(tile, lines, rows, lda, out);
        tile_coded_rows<R - 1>(count, tile, lines, rows, lda, out);
    }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
