#include "sampler.h"

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>

#include "noise.h"

namespace duetto {
namespace {

uint32_t hash(uint64_t key, uint32_t id) {
    DUETTO_NOISE_HASH(uint32_t, id, (uint32_t)key, (uint32_t)(key >> 32))
    return x;
}

// Natural logarithm of a normal number > 0: 2 atanh of (m - 1) / (m + 1), m in [0.7, 1.42). Only
// operations that are rounded exactly, in the order of runner/gumbel.py.
double ln(double number) {
    uint64_t bits;
    std::memcpy(&bits, &number, 8);
    const uint64_t from_root = bits - 0x3fe6a09e667f3bcdu;  // the root of 1/2
    const double exponent = (double)((int64_t)from_root >> 52);
    bits = (from_root & 0xfffffffffffffu) + 0x3fe6a09e667f3bcdu;
    double m;
    std::memcpy(&m, &bits, 8);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double p = 1.0 / 21;
    for (int odd = 19; odd >= 1; odd -= 2) p = p * z + 1.0 / odd;
    return exponent * 0.6931471805599453 + (2.0 * s) * p;
}

struct Best {
    double score;
    int64_t id;
    void offer(double other, int64_t other_id) {
        if (other > score || (other == score && other_id < id)) *this = {other, other_id};
    }
};

double noise_of(uint32_t x) { return -ln(-ln(((double)x + 0.5) * 0x1p-32)); }

float bound(double scaled, uint32_t x) {
    const float half = (float)(int32_t)(~x >> 1) + 0.25f;
    int32_t bits;
    std::memcpy(&bits, &half, 4);
    return (float)std::max(scaled, -1e30) + (kLn2 * (kBitsOfOne - (float)bits * kPerBit) + kSlack);
}

}  // namespace

double gumbel_noise(uint64_t key, uint32_t token_id) { return noise_of(hash(key, token_id)); }

int64_t draw_row(const Kernels& kernels, const float* row, int64_t size, int64_t best,
                 double temperature, uint64_t key) {
    const double largest = row[best];
    Best found{gumbel_noise(key, (uint32_t)best), best};
    // A factor that is too small only makes bounds too large. One that is no normal fp32 number is
    // too coarse for a bound: then every score is computed.
    const bool has_bound = temperature <= 1e30;
    const float factor = (float)std::min(1.0 / temperature, (double)FLT_MAX);
    for (int64_t i = 0; i < size; ++i) {
        if (has_bound)
            i = kernels.first_to_score(row, i, size, (float)largest, factor, key,
                                       (float)found.score);
        if (i >= size) break;
        const double scaled = ((double)row[i] - largest) / temperature;
        found.offer(scaled + gumbel_noise(key, (uint32_t)i), i);
    }
    return found.id;
}

int64_t draw_scaled(const double* scaled, const int64_t* ids, int64_t count, uint64_t key) {
    Best found{-std::numeric_limits<double>::infinity(), std::numeric_limits<int64_t>::max()};
    for (int64_t i = 0; i < count; ++i) {
        const int64_t id = ids == nullptr ? i : ids[i];
        const uint32_t x = hash(key, (uint32_t)id);
        if (bound(scaled[i], x) >= (float)found.score) found.offer(scaled[i] + noise_of(x), id);
    }
    return found.id;
}

}  // namespace duetto
