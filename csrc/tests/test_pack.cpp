// Packing: every format's bytes read back, rounding, scales, sources of three types on top of each
// other, parts of the tiles, and numbers that must be refused.
#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

namespace {

using namespace duetto;

float from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The plain meaning of an f16, for all 65536 of them.
float from_f16(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp((float)fraction, -24);
    return sign * std::ldexp((float)(1024 + fraction), exponent - 25);
}

struct Packed {
    PackedWeight shape;
    std::vector<uint8_t> data;
    std::vector<uint16_t> scales;
    int64_t refused = -1;

    Packed(WeightFormat format, int64_t n, int64_t k, int32_t group) {
        shape = {format, group, n, k, pad8(k), nullptr, nullptr};
        const PackedBytes bytes = packed_bytes(format, n, k, group);
        data.assign(bytes.data, 0xee);
        scales.assign(bytes.scales / 2, 0xeeee);
    }
    Packed& pack(const std::vector<SourceRows>& sources) {
        refused = pack_tiles(shape, sources.data(), (int64_t)sources.size(), 0, num_tiles(shape.n),
                             data.data(), scales.data());
        return *this;
    }
    float scale(int64_t n, int64_t k) const {
        const int64_t group = shape.group == 0 ? shape.k_padded : shape.group;
        const int64_t groups = num_groups(shape.k, shape.group);
        return from_bf16(scales[(size_t)((n / 64 * groups + k / group) * 64 + n % 64)]);
    }
    // also of padding
    int integer(int64_t n, int64_t k) const {
        const int64_t row = n % 64;
        if (shape.format == WeightFormat::int8) {
            const uint8_t* tile = data.data() + n / 64 * shape.k_padded * 64;
            return (int8_t)tile[(k / 4 * 64 + row) * 4 + k % 4];
        }
        const uint8_t* tile = data.data() + n / 64 * shape.k_padded * 32;
        const int byte = tile[(k / 8 * 64 + row) * 4 + k % 4];
        return (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
    }
    float number(int64_t n, int64_t k) const {
        const uint8_t* line;
        switch (shape.format) {
            case WeightFormat::f32: {
                float x;
                std::memcpy(&x, &data[(size_t)((n / 64 * shape.k_padded + k) * 64 + n % 64) * 4],
                            4);
                return x;
            }
            case WeightFormat::bf16: {
                uint16_t half;
                line = &data[(size_t)((n / 64 * shape.k_padded / 2 + k / 2) * 64 + n % 64) * 4];
                std::memcpy(&half, line + k % 2 * 2, 2);
                return from_bf16(half);
            }
            default:
                return (float)integer(n, k) * scale(n, k);
        }
    }
};

std::vector<float> random_weights(int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> w((size_t)count);
    for (float& x : w) x = normal(engine);
    return w;
}

void test_read_back(int64_t n, int64_t k, int32_t group) {
    const std::vector<float> w = random_weights(n * k, 1);
    const std::vector<SourceRows> sources = {{w.data(), SourceType::f32, n, k}};
    const Packed f32 = Packed(WeightFormat::f32, n, k, 0).pack(sources);
    const Packed bf16 = Packed(WeightFormat::bf16, n, k, 0).pack(sources);
    const Packed int8 = Packed(WeightFormat::int8, n, k, group).pack(sources);
    const Packed int4 = Packed(WeightFormat::int4, n, k, group).pack(sources);
    for (int64_t row = 0; row < n; row++) {
        for (int64_t i = 0; i < k; i++) {
            const float x = w[(size_t)(row * k + i)];
            CHECK(f32.number(row, i) == x);
            CHECK(std::fabs(bf16.number(row, i) - x) <= std::fabs(x) * 0x1p-8f);
            CHECK(std::fabs(int8.number(row, i) - x) <= int8.scale(row, i) * 0.5001f);
            CHECK(int8.integer(row, i) != -128);
        }
    }
    // padding is zeros
    for (int64_t row = 0; row < num_tiles(n) * 64; row++) {
        for (int64_t i = 0; i < pad8(k); i++) {
            if (row < n && i < k) continue;
            CHECK(f32.number(row, i) == 0 && bf16.number(row, i) == 0);
            CHECK(int8.integer(row, i) == 0 && int4.integer(row, i) == 0);
            CHECK(row < n || (int8.scale(row, i) == 0 && int4.scale(row, i) == 0));
        }
    }
}

// The searched int4 scale is better than both plain choices, for every group, and much on average.
void test_int4_error() {
    const int64_t n = 64, k = 256;
    const std::vector<float> w = random_weights(n * k, 2);
    const Packed p = Packed(WeightFormat::int4, n, k, 64).pack({{w.data(), SourceType::f32, n, k}});
    double searched = 0, plain = 0;
    for (int64_t row = 0; row < n; row++) {
        for (int64_t g = 0; g < k; g += 64) {
            double error = 0, seven = 0, eight = 0;
            float amax = 0;
            for (int64_t i = g; i < g + 64; i++)
                amax = std::max(amax, std::fabs(w[(size_t)(row * k + i)]));
            for (int64_t i = g; i < g + 64; i++) {
                const float x = w[(size_t)(row * k + i)];
                error += std::pow(p.number(row, i) - x, 2);
                const float q7 = std::nearbyint(x / (amax / 7));
                seven += std::pow(q7 * (amax / 7) - x, 2);
                const float q8 = std::min(7.0f, std::nearbyint(x / (amax / 8)));
                eight += std::pow(q8 * (amax / 8) - x, 2);
            }
            CHECK(error <= std::min(seven, eight) * 1.02);  // their scales are not rounded to bf16
            searched += error, plain += seven;
        }
    }
    CHECK(searched < 0.75 * plain, "%g of %g", searched, plain);
}

void test_all_f16() {
    std::vector<uint16_t> halves;
    for (int h = 0; h < 65536; h++) {
        if ((h & 0x7c00) != 0x7c00) halves.push_back((uint16_t)h);
    }
    const int64_t k = 1024, n = (int64_t)halves.size() / k;
    const std::vector<SourceRows> sources = {{halves.data(), SourceType::f16, n, k}};
    const Packed p = Packed(WeightFormat::f32, n, k, 0).pack(sources);
    CHECK(p.refused == -1);
    for (int64_t i = 0; i < n * k; i++) {
        CHECK(p.number(i / k, i % k) == from_f16(halves[(size_t)i]), "f16 %x", halves[(size_t)i]);
    }
}

// bf16 to bf16 keeps every bit; f32 to bf16 rounds to nearest, ties to even
void test_bf16() {
    std::vector<uint16_t> halves;
    for (int h = 0; h < 65536; h++) {
        if ((h & 0x7f80) != 0x7f80) halves.push_back((uint16_t)h);
    }
    for (const int64_t k : {510, 480}) {  // the second in whole lines, which are only moved
        const int64_t n = (int64_t)halves.size() / k;
        const Packed p =
            Packed(WeightFormat::bf16, n, k, 0).pack({{halves.data(), SourceType::bf16, n, k}});
        CHECK(p.refused == -1);
        for (int64_t i = 0; i < n * k; i++) {
            const float x = p.number(i / k, i % k), wanted = from_bf16(halves[(size_t)i]);
            CHECK(std::memcmp(&x, &wanted, 4) == 0);
        }
    }
    const float ties[] = {1.00390625f, 1.01171875f, -1.00390625f, 1.0039064f};
    const Packed t = Packed(WeightFormat::bf16, 1, 4, 0).pack({{ties, SourceType::f32, 1, 4}});
    CHECK(t.number(0, 0) == 1.0f && t.number(0, 1) == 1.015625f);
    CHECK(t.number(0, 2) == -1.0f && t.number(0, 3) == 1.0078125f);
}

// What bf12 says in kernels.h, read plainly.
uint16_t coded_bits(const uint8_t* tile, int64_t lines, int64_t output, int64_t k) {
    const CodedHead& head = *(const CodedHead*)tile;
    const auto* exceptions = (const CodedException*)(tile + 64 + lines * 192);
    const int64_t number = k / 2 * 128 + output * 2 + k % 2;
    for (int32_t i = 0; i < head.num_exceptions; i++) {
        if (exceptions[i].place == number) return exceptions[i].bits;
    }
    const uint8_t* line = tile + 64 + k / 2 * 192;
    const int64_t in_line = number % 128, chunk = in_line / 32, i = in_line % 32;
    const int64_t place = i / 8 % 2 * 16 + i / 16 * 8 + i % 8;
    const int code = line[128 + chunk / 2 * 32 + place] >> (chunk % 2 * 4) & 15;
    return (uint16_t)(head.high_bytes[code] << 8 | line[chunk * 32 + place]);
}

// bf12 keeps every bit of what bf16 rounds to, exceptions and padding too; or says that it cannot
void test_bf12(int64_t n, int64_t k, int one_in) {
    std::vector<float> w = random_weights(n * k, 11);
    for (int64_t i = one_in / 2; i < n * k; i += one_in) w[(size_t)i] *= i % 3 ? 1e-20f : 1e20f;
    const SourceRows source{w.data(), SourceType::f32, n, k};
    const Packed plain = Packed(WeightFormat::bf16, n, k, 0).pack({source});
    Packed coded(WeightFormat::bf12, n, k, 0);
    CHECK((uintptr_t)coded.data.data() % alignof(CodedException) == 0);
    coded.pack({source});
    CHECK(coded.refused == -1, "%d by %d", (int)n, (int)k);
    const int64_t lines = pad8(k) / 2;
    const auto* bits = (const uint16_t*)plain.data.data();
    int64_t wrong = 0, num_exceptions = 0;
    for (int64_t tile = 0; tile < num_tiles(n); tile++) {
        const uint8_t* from = coded.data.data() + tile * coded_tile_bytes(lines);
        num_exceptions += ((const CodedHead*)from)->num_exceptions;
        for (int64_t i = 0; i < lines * 128; i++, bits++) {
            wrong += coded_bits(from, lines, i % 128 / 2, i / 128 * 2 + i % 2) != *bits;
        }
    }
    CHECK(wrong == 0, "%d by %d", (int)n, (int)k);
    PackedWeight whole = coded.shape;
    whole.data = coded.data.data();
    CHECK(is_whole(whole));
    auto& head = *(CodedHead*)coded.data.data();
    for (const int32_t count : {-1, (int32_t)max_exceptions(lines) + 1}) {
        const int32_t kept = head.num_exceptions;
        head.num_exceptions = count;
        CHECK(!is_whole(whole));
        head.num_exceptions = kept;
    }
    CHECK(num_exceptions > 0 || one_in > n * k, "%d by %d", (int)n, (int)k);
}

void test_too_many_exceptions() {
    std::vector<uint16_t> bits(64 * 256);
    for (size_t i = 0; i < bits.size(); i++) bits[i] = (uint16_t)(i % 128 << 8 | 5);
    for (uint16_t& b : bits) b = (b & 0x7f00) == 0x7f00 ? 0 : b;
    const SourceRows source{bits.data(), SourceType::bf16, 64, 256};
    CHECK(Packed(WeightFormat::bf12, 64, 256, 0).pack({source}).refused == kNotCoded);
}

// Sources on top of each other, with leading dimensions, give the bytes of the one weight they are;
// and so do tiles packed one by one.
void test_sources_and_tiles(int64_t k) {
    const int64_t ld = k + 6;
    std::vector<uint16_t> halves(150 * ld);
    for (size_t i = 0; i < halves.size(); i++) halves[i] = (uint16_t)(0x3c00 + i * 7919 % 1000);
    std::vector<float> w(150 * k);
    for (int64_t row = 0; row < 150; row++) {
        for (int64_t i = 0; i < k; i++)
            w[(size_t)(row * k + i)] = from_bf16(halves[(size_t)(row * ld + i)]);
    }
    for (const WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
        Packed whole(format, 150, k, 32), parts(format, 150, k, 32), tiles(format, 150, k, 32);
        whole.pack({{w.data(), SourceType::f32, 150, k}});
        parts.pack({{halves.data(), SourceType::bf16, 70, ld},
                    {w.data() + 70 * k, SourceType::f32, 0, k},
                    {w.data() + 70 * k, SourceType::f32, 1, k},
                    {halves.data() + 71 * ld, SourceType::bf16, 79, ld}});
        const SourceRows one = {w.data(), SourceType::f32, 150, k};
        for (const int64_t tile : {2, 0, 1}) {
            pack_tiles(tiles.shape, &one, 1, tile, tile + 1, tiles.data.data(),
                       tiles.scales.data());
        }
        CHECK(whole.data == parts.data && whole.scales == parts.scales);
        CHECK(whole.data == tiles.data && whole.scales == tiles.scales);
    }
}

void test_refused() {
    const float nan = std::numeric_limits<float>::quiet_NaN(), inf = INFINITY;
    for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::int8,
                                      WeightFormat::int4, WeightFormat::bf12}) {
        const bool rounds = format == WeightFormat::bf16 || format == WeightFormat::bf12;
        std::vector<float> w = random_weights(150 * 300, 3);
        const auto refused = [&] {
            return Packed(format, 150, 300, 64)
                .pack({{w.data(), SourceType::f32, 150, 300}})
                .refused;
        };
        CHECK(refused() == -1);
        w[149 * 300 + 299] = inf;  // the last number, in the tail
        CHECK(refused() == 149);
        w[90 * 300 + 5] = nan;
        w[80 * 300 + 290] = -inf;  // an earlier row, though a later group
        CHECK(refused() == 80);
        w[0] = nan;
        CHECK(refused() == 0);
        w = random_weights(150 * 300, 3);
        w[70 * 300] = 3.4e38f;  // infinite only in bf16
        CHECK(refused() == (rounds ? 70 : -1));
    }
    std::vector<uint16_t> bits(150 * 320, 0x7f7f);  // the largest number
    const auto refused_bits = [&](WeightFormat format) {
        return Packed(format, 150, 320, 64)
            .pack({{bits.data(), SourceType::bf16, 150, 320}})
            .refused;
    };
    CHECK(refused_bits(WeightFormat::bf16) == -1);
    bits[100 * 320] = 0x7f80;
    bits[90 * 320 + 319] = 0xff81;  // an earlier row, though later numbers
    CHECK(refused_bits(WeightFormat::bf16) == 90 && refused_bits(WeightFormat::int8) == 90);
    bits[319] = 0xff80;
    CHECK(refused_bits(WeightFormat::bf16) == 0 && refused_bits(WeightFormat::int8) == 0);
    const uint16_t halves[] = {0x3c00, 0x7c01};
    CHECK(Packed(WeightFormat::int8, 1, 2, 0).pack({{halves, SourceType::f16, 1, 2}}).refused == 0);
    CHECK(Packed(WeightFormat::int8, 1, 2, 0).pack({{halves, SourceType::bf16, 1, 2}}).refused ==
          -1);
    const uint16_t infinite[] = {0x3c00, 0x7f80};
    CHECK(Packed(WeightFormat::int8, 1, 2, 0).pack({{infinite, SourceType::bf16, 1, 2}}).refused ==
          0);
}

void test_zeros_and_extremes() {
    const float w[4 * 8] = {0,     0,      0,     0, 0, 0, 0, 0, 1e-38f, 0,       0, 0, 0, 0, 0, 0,
                            1e30f, -1e30f, 5e29f, 0, 0, 0, 0, 0, 1e-20f, -1e-20f, 0, 0, 0, 0, 0, 0};
    for (const WeightFormat format : {WeightFormat::int8, WeightFormat::int4}) {
        const Packed p = Packed(format, 4, 8, 0).pack({{w, SourceType::f32, 4, 8}});
        for (int i = 0; i < 16; i++) CHECK(p.number(i / 8, i % 8) == 0);
        for (int i = 16; i < 32; i++) {
            const float tolerance =
                (format == WeightFormat::int8 ? 0.01f : 0.15f) * (i < 24 ? 1e30f : 1e-20f);
            CHECK(std::fabs(p.number(i / 8, i % 8) - w[i]) <= tolerance, "%d", i);
        }
    }
}

}  // namespace

int main() {
    test_read_back(1, 1, 0);
    test_read_back(19, 99, 8);
    test_read_back(111, 500, 128);
    test_read_back(130, 64, 64);
    test_read_back(64, 1032, 0);
    test_int4_error();
    test_all_f16();
    test_bf16();
    test_bf12(1, 1, 1000);
    test_bf12(19, 99, 400);
    test_bf12(130, 500, 300);
    test_bf12(64, 1032, 2000);
    test_too_many_exceptions();
    test_sources_and_tiles(99);
    test_sources_and_tiles(96);
    test_refused();
    test_zeros_and_extremes();
    return report("pack");
}
