// What a token weighs against the likeliest: exp((logit - largest) / temperature) as a whole number of
// 2^-40. Whole numbers are summed exactly, so sums of weights do not depend on their order, nor on how
// many are summed at a time: numpy and every instruction set find the same nucleus. The twin is
// weights() in src/duetto/runner/candidates.py: the same operations in the same order, each rounded once.
#pragma once

#include <cstdint>

namespace duetto {

inline constexpr double kLeastGap = -64.0;  // and less weighs 0
inline constexpr double kWeighed = 29.0;  // a gap that is larger weighs 0: exp(-28.5) < 2^-41
inline constexpr int64_t kMostWeighed = 1 << 23;  // weights whose sum fits 63 bits

// 1 / n!
inline constexpr double kExpTerms[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                       1.0 / 720,     1.0 / 120,    1.0 / 24,    1.0 / 6,
                                       1.0 / 2,       1.0,          1.0};

}  // namespace duetto

// `weight` of x, kLeastGap <= x <= 0: 2^n exp(r), x = n ln 2 + r, with exp's series for |r| < 0.35.
// 1.5 * 2^52 + x has n in its lowest bits; 2^52 + q has q, rounded to even. D, U: double and uint64_t,
// or vectors of them. The series leaves out less than 2^-42 of the weight.
#define DUETTO_WEIGHT(D, U, x)                                                                   \
    const D shifted = (x) * 1.4426950408889634 + 0x1.8p52;                                       \
    const D r = (x) - (shifted - 0x1.8p52) * 0.6931471805599453;                                 \
    D series = r * ::duetto::kExpTerms[0] + ::duetto::kExpTerms[1];                              \
    for (int term = 2; term < 11; ++term) series = series * r + ::duetto::kExpTerms[term];       \
    const U scale_bits = (__builtin_bit_cast(U, shifted) << 52) + ((uint64_t)(1023 + 40) << 52); \
    const D placed = series * __builtin_bit_cast(D, scale_bits) + 0x1p52;                        \
    const U weight = __builtin_bit_cast(U, placed) - (uint64_t)0x4330000000000000;
