// The linear kernels of one instruction set (compiled once per set, as isa.cpp is) against a plain
// loop that must give the same bits, one output at a time.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/linear.h"
#include "pack.h"
#include "tests/check.h"

#define DUETTO_STRING_(x) #x
#define DUETTO_STRING(x) DUETTO_STRING_(x)

namespace isa = duetto::DUETTO_ISA;
using namespace duetto;

namespace {

class Random {
public:
    explicit Random(uint64_t seed) : engine_((std::mt19937_64::result_type)seed) {}
    uint64_t bits() { return engine_(); }
    int64_t below(int64_t n) { return (int64_t)(engine_() % (uint64_t)n); }
    float normal() { return normal_(engine_); }

private:
    std::mt19937_64 engine_;
    std::normal_distribution<float> normal_;
};

// 64-byte aligned memory that ends where it ends, for the sanitizers.
template <class T>
class Aligned {
public:
    explicit Aligned(size_t count)
        : count_(count), data_((T*)std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)) {}
    ~Aligned() { std::free(data_); }
    Aligned(const Aligned&) = delete;
    T* get() { return data_; }
    T& operator[](size_t i) { return data_[i]; }
    size_t bytes() const { return count_ * sizeof(T); }

private:
    size_t count_;
    T* data_;
};

float from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

struct Case {
    WeightFormat format;
    int32_t group;
    int64_t n, k, rows;
};

struct Problem {
    Case c;
    std::vector<float> weights, x;
    PackedWeight packed;
    Aligned<uint8_t> data;
    Aligned<uint16_t> scales;

    Problem(const Case& wanted, uint64_t seed)
        : c(wanted),
          weights((size_t)(c.n * c.k)),
          x((size_t)(c.rows * c.k)),
          data(packed_bytes(c.format, c.n, c.k, c.group).data),
          scales(packed_bytes(c.format, c.n, c.k, c.group).scales / 2) {
        Random random(seed);
        for (float& w : weights) w = random.normal() * (random.below(500) == 0 ? 1e-15f : 0.05f);
        for (float& v : x) v = random.normal() * (random.below(50) == 0 ? 20.0f : 1.0f);
        packed = {c.format, c.group, c.n, c.k, pad8(c.k), data.get(), scales.get()};
        const SourceRows source = {weights.data(), SourceType::f32, c.n, c.k};
        CHECK(pack_tiles(packed, &source, 1, 0, num_tiles(c.n), data.get(), scales.get()) == -1);
    }
};

// -- the plain loop -----------------------------------------------------------------------------
int quantized_weight(const Problem& p, int64_t n, int64_t k) {
    const uint8_t* tile = p.packed.data + n / 64 * (p.packed.k_padded * 64) /
                                              (p.c.format == WeightFormat::int4 ? 2 : 1);
    if (p.c.format == WeightFormat::int8) return (int8_t)tile[(k / 4 * 64 + n % 64) * 4 + k % 4];
    const int byte = tile[(k / 8 * 64 + n % 64) * 4 + k % 4];
    return (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
}

float plain_quantized(const Problem& p, int64_t row, int64_t n) {
    const float* x = p.x.data() + row * p.c.k;
    const int64_t group = p.c.group == 0 ? p.c.k : p.c.group;
    const int64_t groups = num_groups(p.c.k, p.c.group);
    float total = 0;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = g * group, end = std::min(p.c.k, begin + group);
        float amax = 0;
        for (int64_t k = begin; k < end; k++) amax = std::max(amax, std::fabs(x[k]));
        const float scale = amax / 127.0f, inverse = amax == 0 ? 0 : 127.0f / amax;
        int64_t sum = 0;
        for (int64_t k = begin; k < end; k++) {
            sum += (int64_t)std::nearbyintf(x[k] * inverse) * quantized_weight(p, n, k);
        }
        const float weight_scale = from_bf16(p.packed.scales[(n / 64 * groups + g) * 64 + n % 64]);
        total = multiply_add((float)sum, weight_scale * scale, total);
    }
    return total;
}

float plain_float(const Problem& p, int64_t row, int64_t n) {
    const float* x = p.x.data() + row * p.c.k;
    std::vector<float> w((size_t)p.c.k);
    isa::unpack_row(&p.packed, n, w.data());
    const bool rounded = p.c.format != WeightFormat::f32 && isa::Bf16::kRow == isa::Row::bf16;
    float total = 0;
    for (int64_t k = 0; k < p.c.k; k++) {
        const float v = rounded ? from_bf16(isa::f32_to_bf16(x[k])) : x[k];
        total = multiply_add(w[(size_t)k], v, total);
    }
    return total;
}

float plain(const Problem& p, int64_t row, int64_t n) {
    const bool quantized = p.c.format == WeightFormat::int8 || p.c.format == WeightFormat::int4;
    return quantized ? plain_quantized(p, row, n) : plain_float(p, row, n);
}

// The instruction for pairs of bf16 keeps its own order and rounding.
bool has_plain_twin(const Case& c) {
#if defined(__AVX512BF16__)
    return c.format != WeightFormat::bf16 && c.format != WeightFormat::bf12;
#else
    (void)c;
    return true;
#endif
}

bool same(const float* a, const float* b, int64_t count) {
    return std::memcmp(a, b, (size_t)count * 4) == 0;
}

// -- tests --------------------------------------------------------------------------------------
void test_case(const Case& c, uint64_t seed) {
    Problem p(c, seed);
    const size_t row_bytes = isa::prepared_row_bytes(&p.packed);
    CHECK(row_bytes % 64 == 0);
    Aligned<uint8_t> prepared(row_bytes * (size_t)c.rows + 1);
    isa::prepare_rows(&p.packed, p.x.data(), c.k, c.rows, prepared.get());
    const int64_t ldo = c.n + 3, tiles = num_tiles(c.n);
    std::vector<float> all((size_t)(c.rows * ldo + 1), -1.0f), again = all;
    isa::linear(&p.packed, prepared.get(), c.rows, 0, tiles, all.data(), ldo, nullptr, false);

    bool untouched = true, right = true;
    for (int64_t row = 0; row < c.rows; row++) {
        for (int64_t n = c.n; n < ldo; n++) untouched &= all[(size_t)(row * ldo + n)] == -1.0f;
        if (!has_plain_twin(c) || (c.rows > 20 && row % 7 != 3)) continue;
        for (int64_t n = 0; n < c.n; n += c.n > 80 ? 5 : 1) {
            right &= all[(size_t)(row * ldo + n)] == plain(p, row, n);
        }
    }
    CHECK(untouched);
    CHECK(right);

    if (c.format == WeightFormat::bf12) {  // the same bits as bf16
        Problem bf16({WeightFormat::bf16, 0, c.n, c.k, c.rows}, seed);
        isa::linear(&bf16.packed, prepared.get(), c.rows, 0, tiles, again.data(), ldo, nullptr,
                    false);
        CHECK(same(all.data(), again.data(), c.rows * ldo));
    }

    // each row alone, prepared alone, tiles cut elsewhere: the same bits
    Aligned<uint8_t> one(row_bytes);
    for (int64_t row = 0; row < c.rows; row++) {
        isa::prepare_rows(&p.packed, p.x.data() + row * c.k, c.k, 1, one.get());
        for (int64_t tile = 0; tile < tiles; tile++) {
            isa::linear(&p.packed, one.get(), 1, tile, tile + 1, again.data() + row * ldo, ldo,
                        nullptr, false);
        }
    }
    CHECK(same(all.data(), again.data(), c.rows * ldo));
    // and in parts of each height
    for (int64_t part = 2; part <= 14 && part < c.rows; part += kSlow ? 5 : 1) {
        std::fill(again.begin(), again.end(), -1.0f);
        for (int64_t row = 0; row < c.rows; row += part) {
            const int64_t count = std::min(part, c.rows - row);
            isa::linear(&p.packed, prepared.get() + row * (int64_t)row_bytes, count, 0, tiles / 2,
                        again.data() + row * ldo, ldo, nullptr, false);
            isa::linear(&p.packed, prepared.get() + row * (int64_t)row_bytes, count, tiles / 2,
                        tiles, again.data() + row * ldo, ldo, nullptr, false);
        }
        CHECK(same(all.data(), again.data(), c.rows * ldo));
    }
}

void test_bias_and_accumulate() {
    Problem p({WeightFormat::bf16, 0, 70, 40, 3}, 5);
    const size_t row_bytes = isa::prepared_row_bytes(&p.packed);
    Aligned<uint8_t> prepared(row_bytes * 3);
    isa::prepare_rows(&p.packed, p.x.data(), 40, 3, prepared.get());
    std::vector<float> bare(210), out(210), bias(70);
    for (size_t i = 0; i < bias.size(); i++) bias[i] = (float)i * 0.37f;
    for (size_t i = 0; i < out.size(); i++) out[i] = 100.0f + (float)i * 0.11f;
    const std::vector<float> before = out;
    isa::linear(&p.packed, prepared.get(), 3, 0, 2, bare.data(), 70, nullptr, false);
    isa::linear(&p.packed, prepared.get(), 3, 0, 2, out.data(), 70, bias.data(), true);
    for (size_t i = 0; i < out.size(); i++) CHECK(out[i] == before[i] + (bare[i] + bias[i % 70]));
    isa::linear(&p.packed, prepared.get(), 3, 0, 2, out.data(), 70, bias.data(), false);
    for (size_t i = 0; i < out.size(); i++) CHECK(out[i] == bare[i] + bias[i % 70]);
}

// A NaN or an infinity spoils its own row only; zeros and tiny numbers give zeros.
void test_special_rows() {
    for (const WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
        Problem p({format, 32, 64, 96, 7}, 6);
        Aligned<uint8_t> prepared(isa::prepared_row_bytes(&p.packed) * 7);
        std::vector<float> good(7 * 64), out(7 * 64);
        isa::prepare_rows(&p.packed, p.x.data(), 96, 7, prepared.get());
        isa::linear(&p.packed, prepared.get(), 7, 0, 1, good.data(), 64, nullptr, false);
        p.x[1 * 96 + 50] = NAN;
        p.x[3 * 96 + 95] = -INFINITY;
        for (int k = 0; k < 96; k++) p.x[(size_t)(5 * 96 + k)] = k % 2 ? 0.0f : 1e-42f;
        isa::prepare_rows(&p.packed, p.x.data(), 96, 7, prepared.get());
        isa::linear(&p.packed, prepared.get(), 7, 0, 1, out.data(), 64, nullptr, false);
        for (const int row : {0, 2, 4, 6})
            CHECK(same(&out[(size_t)row * 64], &good[(size_t)row * 64], 64));
        for (int n = 0; n < 64; n++) {
            CHECK(std::isnan(out[(size_t)(64 + n)]));
            const float of_infinity = out[(size_t)(3 * 64 + n)];
            CHECK(format == WeightFormat::bf16 ? !std::isfinite(of_infinity)
                                               : std::isnan(of_infinity));
            CHECK(std::fabs(out[(size_t)(5 * 64 + n)]) < 1e-38f);
        }
    }
}

// Largest magnitudes everywhere: 16-bit sums must not wrap, nor 32-bit ones.
void test_extremes() {
    constexpr int64_t k = 12288;
    for (const WeightFormat format : {WeightFormat::int8, WeightFormat::int4}) {
        const bool int4 = format == WeightFormat::int4;
        for (const int32_t group : {0, 64}) {
            for (const int byte : {int4 ? 0xff : 127, int4 ? 0x00 : -127}) {  // 7 or -8
                Problem p({format, group, 64, k, 13}, 7);
                std::memset(p.data.get(), byte, p.data.bytes());
                for (size_t i = 0; i < p.scales.bytes() / 2; i++) p.scales[i] = 0x3f80;  // 1
                for (float& v : p.x) v = -3.0f;
                const float weight = int4 ? (byte == 0 ? -8.0f : 7.0f) : (float)byte;
                Aligned<uint8_t> prepared(isa::prepared_row_bytes(&p.packed) * 13);
                isa::prepare_rows(&p.packed, p.x.data(), k, 13, prepared.get());
                std::vector<float> out(13 * 64);
                for (const int64_t rows : {1, 2, 4, 7, 13}) {
                    isa::linear(&p.packed, prepared.get(), rows, 0, 1, out.data(), 64, nullptr,
                                false);
                    for (int64_t i = 0; i < rows * 64; i++) {
                        CHECK(std::fabs(out[(size_t)i] / (weight * -3 * k) - 1) < 1e-5f);
                    }
                }
            }
        }
    }
}

// What an instruction set has of its own, against its meaning in plain C.
void test_instructions() {
    Random random(9);
    for (int round = 0; round < 100; round++) {
        isa::vi acc, w, a;
        for (int i = 0; i < isa::kLanes; i++) {
            acc[i] = (int32_t)random.bits();
            w[i] = (int32_t)random.bits();
            a[i] = (int32_t)random.bits();
        }
        int8_t wb[64], ab[64];
        int16_t ws[32], as[32];
        std::memcpy(wb, &w, sizeof w), std::memcpy(ab, &a, sizeof a);
        std::memcpy(ws, &w, sizeof w), std::memcpy(as, &a, sizeof a);
        const isa::vi s16 = isa::dot_s16(acc, w, a);
        for (int i = 0; i < isa::kLanes; i++) {
            uint32_t sum = (uint32_t)acc[i];
            for (int j = 0; j < 2; j++) sum += (uint32_t)(ws[2 * i + j] * as[2 * i + j]);
            CHECK(s16[i] == (int32_t)sum);
        }
#if defined(DUETTO_DOT_U8) || defined(DUETTO_DOT_S8)
        for (int i = 0; i < isa::kLanes; i++) acc[i] /= 2;
#if defined(DUETTO_DOT_U8)
        const isa::vi s8 = isa::dot_u8(acc, w, a);
#else
        const isa::vi s8 = isa::dot_s8(acc, w, a);
#endif
        for (int i = 0; i < isa::kLanes; i++) {
            int32_t sum = acc[i];
            for (int j = 4 * i; j < 4 * i + 4; j++) {
#if defined(DUETTO_DOT_U8)
                sum += (int)(uint8_t)wb[j] * ab[j];
#else
                sum += wb[j] * ab[j];
#endif
            }
            CHECK(s8[i] == sum);
        }
#endif
    }
}

}  // namespace

int main() {
    test_instructions();
    test_bias_and_accumulate();
    test_special_rows();
    test_extremes();
    uint64_t seed = 1;
    const int64_t sizes[][2] = {{1, 1},     {19, 99},   {64, 8}, {111, 500},
                                {192, 576}, {65, 1032}, {3, 0}};
    std::vector<int64_t> row_counts = {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 50, 97, 131};
    if (kSlow) row_counts = {0, 1, 2, 3, 4, 5, 6, 7, 13, 97};
#if defined(DUETTO_EMULATE_512)
    row_counts = {0, 1, 3, 6, 7, 13, 97};  // slow
#endif
    for (const auto& [n, k] : sizes) {
        for (const int64_t rows : row_counts) {
            test_case({WeightFormat::f32, 0, n, k, rows}, seed++);
            test_case({WeightFormat::bf16, 0, n, k, rows}, seed++);
            test_case({WeightFormat::bf12, 0, n, k, rows}, seed++);
            for (const int32_t group : {0, 8, 40, 64, 128, 512}) {
                if (rows > 7 && group != 0 && group != 64) continue;
                test_case({WeightFormat::int8, group, n, k, rows}, seed++);
                test_case({WeightFormat::int4, group, n, k, rows}, seed++);
            }
        }
    }
    return report("linear, " DUETTO_STRING(DUETTO_ISA));
}
