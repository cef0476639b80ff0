// The hash of the sampler's noise. Plain 32-bit arithmetic, so it reads the same for one number and
// for a vector of them, here, in numpy and on a GPU.
#pragma once

#include <cstdint>

namespace duetto {

// Ahead of the exact score comes a bound of it. With t = 1 - u: noise <= -log t, as -log(1 - t) >= t;
// and log2 t is at least exponent + mantissa, the bits of a float read as a number. kSlack covers the
// roundings of fp32 while (max - logit) / temperature is at most 40; what is further from the largest
// cannot be drawn, as two noises differ by less than 26.1.
inline constexpr float kLn2 = 0.69314718f;
inline constexpr float kSlack = 1e-4f;
inline constexpr float kBitsOfOne = 127.0f + 31.0f;  // the exponent of 1, and of t * 2^31
inline constexpr float kPerBit = 1.0f / 8388608.0f;  // of a mantissa

}  // namespace duetto

// Two rounds of lowbias32 (Wellons, "Prospecting for hash functions", 2018), each under half of the
// key. A bijection of ids for one key. U: uint32_t, or a vector of them.
#define DUETTO_NOISE_HASH(U, id, low, high)          \
    U x = (id) ^ (low);                              \
    for (int round = 0; round < 2; ++round) {        \
        x = (x ^ (x >> 16)) * (uint32_t)0x7feb352du; \
        x = (x ^ (x >> 15)) * (uint32_t)0x846ca68bu; \
        x ^= x >> 16;                                \
        if (round == 0) x ^= (high);                 \
    }
