// How whoever waits for another thread or process waits: it spins, then yields, then sleeps.
//
// A barrier is left within a microsecond, unless another thread's work is longer or the system has
// taken its processor away. Spinning bridges the first. In the second case the missing thread may be
// waiting for this very processor, so spinning is short, and yielding costs nothing where nobody else
// wants to run. The longer bound also bridges the host's work between two steps.
#pragma once

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace duetto {

inline constexpr auto kSpin = std::chrono::microseconds(5);
inline constexpr auto kYield = std::chrono::microseconds(300);
inline constexpr int kPausesPerLook = 32;  // at the clock

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
}

}  // namespace duetto
