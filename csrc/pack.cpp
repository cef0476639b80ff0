#include "pack.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace duetto {
namespace {

// Eight numbers at once, in the compiler's generic vectors: any target can do it, and gets the same bits.
constexpr int kStep = 8;
typedef float Floats __attribute__((vector_size(kStep * 4)));
typedef int32_t Ints __attribute__((vector_size(kStep * 4)));
typedef uint32_t Bits __attribute__((vector_size(kStep * 4)));
typedef uint16_t Halves __attribute__((vector_size(kStep * 2)));
typedef int8_t Bytes __attribute__((vector_size(kStep)));

// Adding it rounds a float below 2^22 to an integer, ties to even, and leaves that in the low bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundBits = 0x4b400000;
constexpr uint32_t kInfinity = 0x7f800000;
constexpr float kTiny = 1e-30f;  // a group that is smaller is zeros: its scale has no inverse

template <class T>
inline __attribute__((always_inline)) T load(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline float float_from(uint16_t bf16) {
    const uint32_t bits = (uint32_t)bf16 << 16;
    return load<float>(&bits);
}

// of a finite number that does not become infinite
inline uint16_t bf16_nearest(float x) {
    const uint32_t bits = load<uint32_t>(&x);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t bf16_away_from_zero(float x) {
    return (uint16_t)((load<uint32_t>(&x) + 0xffff) >> 16);
}

inline Floats widen(Halves halves, SourceType type) {
    const Bits h = __builtin_convertvector(halves, Bits);
    if (type == SourceType::bf16) return (Floats)(h << 16);
    // f16: the exponent's bias by a multiplication (which subnormals need), infinities by hand
    const Floats scaled = (Floats)((h & 0x7fff) << 13) * 0x1p112f;
    const Bits special = (Bits)((h & 0x7c00) == 0x7c00) & kInfinity;
    return (Floats)((Bits)scaled | special | ((h & 0x8000) << 16));
}

// x[0 ... padded) = the numbers at k of a row, then zeros. Returns the largest magnitude's bits,
// which are above all numbers' for an infinity or a NaN.
uint32_t read_numbers(const SourceRows& source, int64_t row, int64_t k, int64_t count,
                      int64_t padded, float* x) {
    const size_t size = source.type == SourceType::f32 ? 4 : 2;
    const uint8_t* p = (const uint8_t*)source.data + (size_t)(row * source.ld + k) * size;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
        const Floats v =
            size == 4 ? load<Floats>(p + i * 4) : widen(load<Halves>(p + i * 2), source.type);
        std::memcpy(x + i, &v, sizeof v);
    }
    if (i < padded) {
        std::memset(x + i, 0, (size_t)(padded - i) * 4);
        uint8_t last[kStep * 4] = {};
        std::memcpy(last, p + i * size, (size_t)(count - i) * size);
        const Floats v = size == 4 ? load<Floats>(last) : widen(load<Halves>(last), source.type);
        if (count > i) std::memcpy(x + i, &v, (size_t)(count - i) * 4);
    }
    Bits top = {};
    for (i = 0; i + kStep <= padded; i += kStep) {
        const Bits bits = load<Bits>(x + i) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    uint32_t most = 0;
    for (int lane = 0; lane < kStep; lane++) most = std::max(most, top[lane]);
    return most;
}

inline Ints rounded(Floats scaled) { return (Ints)(scaled + kRound) - kRoundBits; }

inline __attribute__((always_inline)) float sum(Floats v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// -- int8 ---------------------------------------------------------------------------------------
uint16_t pack_int8(const float* x, int64_t count, float largest, uint32_t* words) {
    if (largest < kTiny) {
        std::memset(words, 0, (size_t)count);
        return 0;
    }
    const uint16_t scale = bf16_away_from_zero(largest / 127.0f);
    const float inverse = 1.0f / float_from(scale);
    for (int64_t i = 0; i < count; i += kStep) {
        const Bytes q = __builtin_convertvector(rounded(load<Floats>(x + i) * inverse), Bytes);
        std::memcpy((uint8_t*)words + i, &q, sizeof q);
    }
    return scale;
}

// -- int4 ---------------------------------------------------------------------------------------
// Its search is most of the time that packing takes, so it is compiled for AVX2 as well: the same
// operations on the same lanes (and no fused multiply-adds), so the same bits.
#define DUETTO_ALWAYS_INLINE inline __attribute__((always_inline))

DUETTO_ALWAYS_INLINE Floats int4_values(Floats x, float inverse) {
    const Floats shifted = x * inverse + kRound;
    const Floats low = Floats{} + (kRound - 8), high = Floats{} + (kRound + 7);
    Floats kept = shifted > high ? high : shifted;
    kept = kept < low ? low : kept;
    return kept - kRound;
}

DUETTO_ALWAYS_INLINE float int4_error(const float* x, int64_t count, float scale) {
    const float inverse = 1.0f / scale;
    Floats total = {};
    for (int64_t i = 0; i < count; i += kStep) {
        const Floats v = load<Floats>(x + i), wrong = v - int4_values(v, inverse) * scale;
        total += wrong * wrong;
    }
    return sum(total);
}

// The scale that fits best the values that `scale` rounds to: sum(x q) / sum(q q).
DUETTO_ALWAYS_INLINE float int4_refit(const float* x, int64_t count, float scale) {
    const float inverse = 1.0f / scale;
    Floats xq = {}, qq = {};
    for (int64_t i = 0; i < count; i += kStep) {
        const Floats v = load<Floats>(x + i), q = int4_values(v, inverse);
        xq += v * q;
        qq += q * q;
    }
    return sum(xq) / sum(qq);
}

DUETTO_ALWAYS_INLINE uint16_t int4_search(const float* x, int64_t count, float largest) {
    int64_t at = 0;
    while (at + 1 < count && !(x[at] == largest || x[at] == -largest)) at++;
    const float extreme = x[at];
    // where the extreme goes: beyond -8 or 7 it is clipped, for the others' good
    constexpr float kPlaces[] = {-7.0f, -7.4f, -7.7f, -8.0f, -8.4f, -8.9f, -9.5f, 7.0f, 7.5f, 8.0f};
    constexpr int kNumPlaces = sizeof kPlaces / sizeof *kPlaces;
    uint16_t best = bf16_nearest(extreme / -8.0f);  // stays if squares overflow
    float least = __builtin_inff();
    for (int i = 0; i <= kNumPlaces; i++) {  // then the best of them, refined
        const float wanted =
            i < kNumPlaces ? extreme / kPlaces[i] : int4_refit(x, count, float_from(best));
        const uint16_t scale = bf16_nearest(wanted);
        const float error = int4_error(x, count, float_from(scale));
        if (error < least) least = error, best = scale;
    }
    return best;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint16_t int4_search_avx2(const float* x, int64_t count,
                                                          float largest) {
    return int4_search(x, count, largest);
}
#endif

uint16_t int4_scale(const float* x, int64_t count, float largest) {
#if defined(__x86_64__)
    static const bool avx2 = __builtin_cpu_supports("avx2");
    if (avx2) return int4_search_avx2(x, count, largest);
#endif
    return int4_search(x, count, largest);
}

uint16_t pack_int4(const float* x, int64_t count, float largest, uint32_t* words) {
    if (largest < kTiny) {
        std::memset(words, 0x88, (size_t)count / 2);
        return 0;
    }
    const uint16_t scale = int4_scale(x, count, largest);
    const float inverse = 1.0f / float_from(scale);
    for (int64_t i = 0; i < count; i += kStep) {
        const Floats q = int4_values(load<Floats>(x + i), inverse) + 8.0f;
        const Bytes nibbles = __builtin_convertvector(__builtin_convertvector(q, Ints), Bytes);
        uint64_t all;
        std::memcpy(&all, &nibbles, sizeof all);
        words[i / 8] = (uint32_t)all | (uint32_t)(all >> 32) << 4;
    }
    return scale;
}

// -- bf16 ---------------------------------------------------------------------------------------
typedef uint32_t Four __attribute__((vector_size(16)));
typedef int16_t Eight __attribute__((vector_size(16)));

constexpr int64_t kLine = 32;  // bf16 numbers of a cache line
constexpr int16_t kNotFinite = 0x7f80;

// 4 rows of 4 words become 4 words of 4 rows.
DUETTO_ALWAYS_INLINE void transpose(const Four (&in)[4], uint32_t* out) {
    const Four a = __builtin_shuffle(in[0], in[1], (Four){0, 4, 1, 5});
    const Four b = __builtin_shuffle(in[2], in[3], (Four){0, 4, 1, 5});
    const Four c = __builtin_shuffle(in[0], in[1], (Four){2, 6, 3, 7});
    const Four d = __builtin_shuffle(in[2], in[3], (Four){2, 6, 3, 7});
    const Four words[4] = {
        __builtin_shuffle(a, b, (Four){0, 1, 4, 5}), __builtin_shuffle(a, b, (Four){2, 3, 6, 7}),
        __builtin_shuffle(c, d, (Four){0, 1, 4, 5}), __builtin_shuffle(c, d, (Four){2, 3, 6, 7})};
    for (int word = 0; word < 4; word++) std::memcpy(out + word * kTile, &words[word], 16);
}

// A tile of bf16 from 64 whole rows of bf16, whose bits stay as they are: at the speed of memory.
// False if one of the numbers is not finite.
bool copy_bf16_tile(const SourceRows& source, int64_t row, int64_t k, uint32_t* out) {
    const auto* from = (const uint16_t*)source.data + row * source.ld;
    Eight most = {};
    for (int64_t i = 0; i < k; i += kLine, out += kLine / 2 * kTile) {
        for (int64_t output = 0; output < kTile; output += 4) {
            const uint16_t* rows = from + output * source.ld + i;
            for (int64_t part = 0; part < kLine; part += 8) {
                Four words[4];
                for (int j = 0; j < 4; j++) {
                    words[j] = load<Four>(rows + j * source.ld + part);
                    const Eight size = (Eight)words[j] & 0x7fff;
                    most = size > most ? size : most;
                }
                transpose(words, out + part / 2 * kTile + output);
            }
        }
    }
    bool finite = true;
    for (int lane = 0; lane < 8; lane++) finite &= most[lane] < kNotFinite;
    return finite;
}

void pack_bf16(const float* x, int64_t count, uint32_t* words) {
    for (int64_t i = 0; i < count; i += kStep) {
        const Bits bits = load<Bits>(x + i);
        const Halves h =
            __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
        std::memcpy((uint16_t*)words + i, &h, sizeof h);
    }
}

// -- tiles --------------------------------------------------------------------------------------
int64_t numbers_per_word(WeightFormat format) {
    switch (format) {
        case WeightFormat::f32:
            return 1;
        case WeightFormat::bf16:
        case WeightFormat::bf12:
            return 2;
        case WeightFormat::int8:
            return 4;
        case WeightFormat::int4:
            return 8;
    }
    return 1;
}

bool is_quantized(WeightFormat format) {
    return format == WeightFormat::int8 || format == WeightFormat::int4;
}

// The largest magnitude that a format can take: bf16 rounds what is nearly 2^128 to infinity.
uint32_t first_refused(WeightFormat format) {
    return format == WeightFormat::bf16 ? 0x7f7f8000 : kInfinity;
}

struct RowFinder {
    const SourceRows* sources;
    int64_t num_sources;

    // `row` becomes the row within the source
    const SourceRows& find(int64_t& row) const {
        int64_t i = 0;
        while (i + 1 < num_sources && row >= sources[i].rows) row -= sources[i++].rows;
        return sources[i];
    }
};

// The tile is made, if it needs nothing but other places for its numbers.
bool only_moves(const PackedWeight& shape, const RowFinder& rows, int64_t tile, uint32_t* out) {
    int64_t row = tile * kTile;
    const SourceRows& source = rows.find(row);
    const bool same_bits = shape.format == WeightFormat::bf16 && source.type == SourceType::bf16;
    if (!same_bits || shape.k % kLine != 0 || row + kTile > source.rows) return false;
    return copy_bf16_tile(source, row, shape.k, out);
}

// One tile after the other, of any format but bf12, which is coded from what this makes of bf16.
class TilePacker {
public:
    TilePacker(const PackedWeight& shape, const RowFinder& rows) : shape_(shape), rows_(rows) {
        constexpr int64_t kUnquantizedRun = 256;
        quantized_ = is_quantized(shape.format);
        per_word_ = numbers_per_word(shape.format);
        k_padded_ = pad8(shape.k);
        // K is packed in runs: groups, if there are scales
        run_ = kUnquantizedRun;
        if (quantized_) run_ = shape.group == 0 ? std::max<int64_t>(k_padded_, 8) : shape.group;
        runs_ = quantized_ ? num_groups(shape.k, shape.group) : (k_padded_ + run_ - 1) / run_;
        stride_ = run_ / per_word_ + 4;  // words; not a power of two
        numbers_.resize((size_t)run_);
        words_.resize((size_t)(stride_ * kTile));
    }

    // `out` and `scales` are the tile's. Returns -1, or the first row that is refused.
    int64_t pack(int64_t tile, uint32_t* out, uint16_t* scales) {
        if (only_moves(shape_, rows_, tile, out)) return -1;
        int64_t refused = shape_.n;
        for (int64_t g = 0; g < runs_; g++, scales += kTile) {
            const int64_t k = g * run_;
            const int64_t padded = std::min(run_, k_padded_ - k);
            for (int64_t output = 0; output < kTile; output++) {
                uint32_t* to = words_.data() + output * stride_;
                const uint32_t top = read(tile * kTile + output, k, padded);
                if (top >= first_refused(shape_.format)) {
                    refused = std::min(refused, tile * kTile + output);
                }
                if (refused < shape_.n) continue;  // only looks for a yet earlier row
                const uint16_t scale = write(load<float>(&top), padded, to);
                if (quantized_) scales[output] = scale;
            }
            for (int64_t word = 0; word < padded / per_word_; word++) {
                for (int64_t output = 0; output < kTile; output++) {
                    *out++ = words_[(size_t)(output * stride_ + word)];
                }
            }
        }
        return refused < shape_.n ? refused : -1;
    }

private:
    uint32_t read(int64_t row, int64_t k, int64_t padded) {
        if (row >= shape_.n) {
            std::memset(numbers_.data(), 0, (size_t)padded * 4);
            return 0;
        }
        const SourceRows& source = rows_.find(row);
        const int64_t count = std::min(run_, shape_.k - k);
        return read_numbers(source, row, k, count, padded, numbers_.data());
    }

    uint16_t write(float largest, int64_t padded, uint32_t* to) const {
        const float* x = numbers_.data();
        switch (shape_.format) {
            case WeightFormat::f32:
                std::memcpy(to, x, (size_t)padded * 4);
                return 0;
            case WeightFormat::bf16:
                pack_bf16(x, padded, to);
                return 0;
            case WeightFormat::int8:
                return pack_int8(x, padded, largest, to);
            case WeightFormat::int4:
                return pack_int4(x, padded, largest, to);
            case WeightFormat::bf12:
                break;
        }
        return 0;
    }

    PackedWeight shape_;
    RowFinder rows_;
    bool quantized_;
    int64_t per_word_, k_padded_, run_, runs_, stride_;
    std::vector<float> numbers_;
    std::vector<uint32_t> words_;
};

// -- bf12 ---------------------------------------------------------------------------------------

// The 8 exponents (without their last bit) that are most frequent in every `step`-th line.
void choose_codes(const uint16_t* numbers, int64_t lines, int64_t step, CodedHead* head) {
    int32_t seen[4][256] = {};  // four, as a number is often like the one before
    for (int64_t line = 0; line < lines; line += step) {
        for (int i = 0; i < kLineNumbers; i++) seen[i % 4][numbers[line * kLineNumbers + i] >> 8]++;
    }
    int32_t frequency[128];
    int order[128];
    for (int e = 0; e < 128; e++) {
        frequency[e] = 0;
        for (const auto& part : seen) frequency[e] += part[e] + part[e + 128];
        order[e] = e;
    }
    std::stable_sort(order, order + 128, [&](int x, int y) { return frequency[x] > frequency[y]; });
    for (int code = 0; code < 8; code++) {
        head->high_bytes[code] = (uint8_t)order[code];
        head->high_bytes[code + 8] = (uint8_t)(order[code] | 128);
    }
}

typedef uint8_t Places __attribute__((vector_size(8)));
typedef uint8_t Codes __attribute__((vector_size(32)));
constexpr uint8_t kNoCode = 16;

// One line; returns whether it has exceptions.
DUETTO_ALWAYS_INLINE bool code_line(const uint16_t* numbers, const CodedHead& head, uint8_t* out) {
    uint8_t high[kLineNumbers];
    for (int i = 0; i < kLineNumbers; i += kStep) {
        const int place = i / 32 * 32 + coded_place(i % 32);
        const Halves bits = load<Halves>(numbers + i);
        const Places low_bytes = __builtin_convertvector(bits & 255, Places);
        const Places high_bytes = __builtin_convertvector(bits >> 8, Places);
        std::memcpy(out + place, &low_bytes, sizeof low_bytes);
        std::memcpy(high + place, &high_bytes, sizeof high_bytes);
    }
    Codes codes[4], any = {};
    for (int chunk = 0; chunk < 4; chunk++) {
        const Codes bytes = load<Codes>(high + chunk * 32), exponents = bytes & 127;
        codes[chunk] = Codes{} + kNoCode;
        for (int code = 0; code < 8; code++) {
            const auto equal = (Codes)(exponents == head.high_bytes[code]);
            codes[chunk] = (codes[chunk] & ~equal) | (equal & (uint8_t)code);
        }
        any |= codes[chunk];
        codes[chunk] = (codes[chunk] & 7) | (bytes >> 4 & 8);
    }
    for (int half = 0; half < 2; half++) {
        const Codes both = codes[half * 2] | codes[half * 2 + 1] << 4;
        std::memcpy(out + 128 + half * 32, &both, sizeof both);
    }
    uint64_t parts[4];
    std::memcpy(parts, &any, sizeof parts);
    return ((parts[0] | parts[1] | parts[2] | parts[3]) & 0x1010101010101010) != 0;
}

bool is_coded(uint16_t number, const CodedHead& head) {
    const auto end = head.high_bytes + 8;
    return std::find(head.high_bytes, end, number >> 8 & 127) != end;
}

// All lines, and their exceptions in the tile's order. False if there are too many.
DUETTO_ALWAYS_INLINE bool code_lines(const uint16_t* numbers, int64_t lines, uint8_t* tile) {
    auto& head = *(CodedHead*)tile;
    uint8_t* out = tile + sizeof(CodedHead);
    auto* exceptions = (CodedException*)(out + lines * kCodedLineBytes);
    head.num_exceptions = 0;
    for (int64_t line = 0; line < lines; line++, out += kCodedLineBytes, numbers += kLineNumbers) {
        if (!code_line(numbers, head, out)) continue;
        for (int i = 0; i < kLineNumbers; i++) {
            if (is_coded(numbers[i], head)) continue;
            if (head.num_exceptions == max_exceptions(lines)) return false;
            exceptions[head.num_exceptions++] = {(int32_t)(line * kLineNumbers + i), numbers[i], 0};
        }
    }
    return true;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) bool code_lines_avx2(const uint16_t* numbers, int64_t lines,
                                                     uint8_t* tile) {
    return code_lines(numbers, lines, tile);
}
#endif

// A tile of bf16 in 12 bits each. False if there are too many exceptions.
bool code_tile(const uint16_t* numbers, int64_t lines, uint8_t* tile) {
    auto* head = (CodedHead*)tile;
    std::memset(head, 0, sizeof *head);
    if (lines * kLineNumbers > INT32_MAX) return false;  // a place is 32 bits
    for (const int64_t step : {8, 1}) {  // all lines are looked at where some do not tell enough
        choose_codes(numbers, lines, step, head);
#if defined(__x86_64__)
        static const bool avx2 = __builtin_cpu_supports("avx2");
        if (avx2 ? code_lines_avx2(numbers, lines, tile) : code_lines(numbers, lines, tile))
            return true;
#else
        if (code_lines(numbers, lines, tile)) return true;
#endif
    }
    return false;
}

}  // namespace

PackedBytes packed_bytes(WeightFormat format, int64_t n, int64_t k, int32_t group) {
    const int64_t tiles = num_tiles(n);
    const int64_t words = pad8(k) / numbers_per_word(format);  // of an output: lines of a tile
    const int64_t scales = is_quantized(format) ? num_groups(k, group) : 0;
    if (format == WeightFormat::bf12) return {(size_t)(tiles * coded_tile_bytes(words)), 0};
    return {(size_t)(tiles * words * kTile * 4), (size_t)(tiles * scales * kTile * 2)};
}

bool is_whole(const PackedWeight& coded) {
    const int64_t lines = coded.k_padded / 2, tile_bytes = coded_tile_bytes(lines);
    for (int64_t tile = 0; tile < num_tiles(coded.n); tile++) {
        const uint8_t* at = coded.data + tile * tile_bytes;
        const int32_t count = ((const CodedHead*)at)->num_exceptions;
        if (count < 0 || count > max_exceptions(lines)) return false;
        at += sizeof(CodedHead) + lines * kCodedLineBytes;
        int64_t last = -1;
        for (int32_t i = 0; i < count; i++) {
            const int64_t place = ((const CodedException*)at)[i].place;
            if (place <= last || place >= lines * kLineNumbers) return false;
            last = place;
        }
    }
    return true;
}

int64_t pack_tiles(const PackedWeight& shape, const SourceRows* sources, int64_t num_sources,
                   int64_t tile_begin, int64_t tile_end, uint8_t* data, uint16_t* scales) {
    const RowFinder rows{sources, num_sources};
    const bool coded = shape.format == WeightFormat::bf12;
    PackedWeight plain = shape;
    if (coded) plain.format = WeightFormat::bf16;
    TilePacker packer(plain, rows);
    const int64_t words = pad8(shape.k) / numbers_per_word(shape.format);
    const int64_t tile_bytes = coded ? coded_tile_bytes(words) : words * kTile * 4;
    const int64_t tile_scales = scales == nullptr ? 0 : num_groups(shape.k, shape.group) * kTile;
    std::vector<uint32_t> numbers((size_t)(coded ? words * kTile : 0));
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        uint8_t* out = data + tile * tile_bytes;
        uint32_t* to = coded ? numbers.data() : (uint32_t*)out;
        const int64_t refused = packer.pack(tile, to, scales + tile * tile_scales);
        if (refused >= 0) return refused;
        if (coded && !code_tile((const uint16_t*)to, words, out)) return kNotCoded;
    }
    return -1;
}

}  // namespace duetto
