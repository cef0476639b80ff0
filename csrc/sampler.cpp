#include "sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "noise.h"
#include "weight.h"

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
    Ranked token;
    void offer(double other, const Ranked& other_token) {
        if (other > score || (other == score && other_token.id < token.id))
            *this = {other, other_token};
    }
};

double noise_of(uint32_t x) { return -ln(-ln(((double)x + 0.5) * 0x1p-32)); }

float bound(double scaled, uint32_t x) {
    const float half = (float)(int32_t)(~x >> 1) + 0.25f;
    int32_t bits;
    std::memcpy(&bits, &half, 4);
    return (float)std::max(scaled, -1e30) + (kLn2 * (kBitsOfOne - (float)bits * kPerBit) + kSlack);
}

// The largest float that is not above.
float rounded_down(double number) {
    const double bounded = std::min(number, (double)FLT_MAX);
    const float nearest = (float)bounded;
    return (double)nearest > bounded ? std::nextafter(nearest, -INFINITY) : nearest;
}

uint64_t weight_of(double gap) {
    const double x = std::max(gap, kLeastGap);
    DUETTO_WEIGHT(double, uint64_t, x)
    return weight;
}

// Of the tokens ahead of `limit`, the one with the largest score. The first of all is ahead of it.
Ranked draw_ahead(const Kernels& kernels, const Logits& logits, const Ranked& limit,
                  double temperature, uint64_t key) {
    const Ranked& first = logits.first;
    Best found{gumbel_noise(key, (uint32_t)first.id), first};
    // A factor or a largest logit that is rounded only makes bounds too large. A factor that is no
    // normal fp32 number is too coarse for a bound: then every score is computed.
    const bool has_bound = temperature <= 1e30;
    const float factor = (float)std::min(1.0 / temperature, (double)FLT_MAX);
    const float largest = rounded_down(first.logit), lowest = rounded_down(limit.logit);
    for (int64_t i = 0; i < logits.size; ++i) {
        if (has_bound)
            i = kernels.first_to_score(logits.row, i, logits.size, largest, factor, key, lowest,
                                       (float)found.score);
        if (i >= logits.size) break;
        const Ranked token{logits.row[i], i};
        if (!token.is_ahead_of(limit)) continue;
        const double scaled = (token.logit - first.logit) / temperature;
        found.offer(scaled + gumbel_noise(key, (uint32_t)i), token);
    }
    for (int64_t i = 0; i < logits.num_changed; ++i) {
        const Ranked& token = logits.changed[i];
        if (!token.is_ahead_of(limit)) continue;
        const double scaled = (token.logit - first.logit) / temperature;
        const uint32_t x = hash(key, (uint32_t)token.id);
        if (bound(scaled, x) >= (float)found.score) found.offer(scaled + noise_of(x), token);
    }
    return found.token;
}

struct Weights {
    uint64_t kept, ahead;
};

// What the tokens from the logit `lowest` on weigh, and those ahead of `token`.
Weights weigh(const Kernels& kernels, const Logits& logits, double temperature, double lowest,
              const Ranked& token) {
    const double inverse = std::min(1.0 / temperature, DBL_MAX), largest = logits.first.logit;
    const double up_to[2] = {lowest, token.logit};
    const double beyond[2] = {lowest, std::nextafter(token.logit, INFINITY)};
    const double floor = std::max(std::min(lowest, token.logit), largest - kWeighed * temperature);
    const int64_t middle = std::min(token.id, logits.size), rest = logits.size - middle;
    uint64_t sums[2] = {};
    kernels.weigh(logits.row, middle, largest, inverse, rounded_down(floor), up_to, sums);
    kernels.weigh(logits.row + middle, rest, largest, inverse, rounded_down(floor), beyond, sums);
    for (int64_t i = 0; i < logits.num_changed; ++i) {
        const Ranked& other = logits.changed[i];
        const uint64_t weight = weight_of((other.logit - largest) * inverse);
        if (other.logit >= lowest) sums[0] += weight;
        if (other.is_ahead_of(token)) sums[1] += weight;
    }
    return {sums[0], sums[1]};
}

// The `count` first tokens, in any order; all that are not -inf if they are no more.
std::vector<Ranked> first_tokens(const Kernels& kernels, const Logits& logits, int64_t count) {
    const auto is_ahead = [](const Ranked& a, const Ranked& b) { return a.is_ahead_of(b); };
    // `count` blocks have a largest logit that reaches `least`, so that many tokens do.
    const int64_t block = std::clamp<int64_t>(logits.size / (8 * count), 16, 1024);
    std::vector<float> maxima((logits.size + block - 1) / block);
    kernels.block_maxima(logits.row, logits.size, block, maxima.data());
    double least = -DBL_MAX;
    if ((int64_t)maxima.size() > count) {
        std::vector<float> ordered = maxima;
        std::nth_element(ordered.begin(), ordered.begin() + count - 1, ordered.end(),
                         std::greater<float>());
        least = std::max(least, (double)ordered[count - 1]);
    }
    std::vector<Ranked> tokens;
    for (size_t b = 0; b < maxima.size(); ++b) {
        if (maxima[b] < least) continue;
        const int64_t begin = (int64_t)b * block, end = std::min(begin + block, logits.size);
        for (int64_t i = begin; i < end; ++i)
            if (logits.row[i] >= least) tokens.push_back({logits.row[i], i});
    }
    for (int64_t i = 0; i < logits.num_changed; ++i)
        if (logits.changed[i].logit >= least) tokens.push_back(logits.changed[i]);
    if ((int64_t)tokens.size() > count) {
        std::nth_element(tokens.begin(), tokens.begin() + count, tokens.end(), is_ahead);
        tokens.resize((size_t)count);
    }
    return tokens;
}

}  // namespace

double gumbel_noise(uint64_t key, uint32_t token_id) { return noise_of(hash(key, token_id)); }

int64_t draw_row(const Kernels& kernels, const float* row, int64_t size, int64_t best,
                 double temperature, uint64_t key) {
    const Ranked none{-std::numeric_limits<double>::infinity(), 0};
    return draw_ahead(kernels, {row, size, nullptr, 0, {row[best], best}}, none, temperature, key)
        .id;
}

int64_t draw_filtered(const Kernels& kernels, const Logits& logits, const Filters& filters,
                      uint64_t key) {
    Logits from = logits;
    std::vector<Ranked> tokens;
    if (filters.top_k > 0 && filters.top_k < logits.size) {
        tokens = first_tokens(kernels, logits, filters.top_k);
        from = {nullptr, 0, tokens.data(), (int64_t)tokens.size(), logits.first};
    }
    const double temperature = filters.temperature;
    Ranked limit{filters.lowest, std::numeric_limits<int64_t>::max()};
    Ranked token = draw_ahead(kernels, from, limit, temperature, key);
    if (filters.top_p >= 1.0) return token.id;
    const Weights weights = weigh(kernels, from, temperature, filters.lowest, token);
    const double wanted = filters.top_p * (double)weights.kept;
    uint64_t ahead = weights.ahead;
    while (!((double)ahead < wanted)) {  // the nucleus holds what is wanted without this token
        limit = token;
        token = draw_ahead(kernels, from, limit, temperature, key);
        ahead = weigh(kernels, from, temperature, INFINITY, token).ahead;
    }
    return token.id;
}

int64_t draw_scaled(const double* scaled, const int64_t* ids, int64_t count, uint64_t key) {
    Best found{-std::numeric_limits<double>::infinity(), {0, std::numeric_limits<int64_t>::max()}};
    for (int64_t i = 0; i < count; ++i) {
        const int64_t id = ids == nullptr ? i : ids[i];
        const uint32_t x = hash(key, (uint32_t)id);
        if (bound(scaled[i], x) >= (float)found.score)
            found.offer(scaled[i] + noise_of(x), {scaled[i], id});
    }
    return found.token.id;
}

uint64_t philox(uint64_t counter, uint64_t key_low, uint64_t key_high) {
    using Wide = unsigned __int128;
    uint64_t words[4] = {counter, 0, 0, 0};
    for (int round = 0; round < 10; ++round) {
        const Wide even = (Wide)0xD2E7470EE14C6C93u * words[0];
        const Wide odd = (Wide)0xCA5A826395121157u * words[2];
        const uint64_t first = (uint64_t)(odd >> 64) ^ words[1] ^ key_low;
        const uint64_t third = (uint64_t)(even >> 64) ^ words[3] ^ key_high;
        words[0] = first, words[1] = (uint64_t)odd, words[2] = third, words[3] = (uint64_t)even;
        key_low += 0x9E3779B97F4A7C15u;
        key_high += 0xBB67AE8584CAA73Bu;
    }
    return words[0];
}

}  // namespace duetto
