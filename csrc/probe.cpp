#include "probe.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "arena.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace duetto {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// -- arithmetic: chains of one instruction, as many as hide its latency ------------------------------
//
// Each function runs kRounds rounds and returns the operations of one thread. The empty asm statements
// hide values from the compiler, which would else compute them once or not at all.

constexpr int64_t kRounds = 1 << 16;
constexpr int kChains = 12;

#if defined(__x86_64__)

double fp32_baseline() {
    __m128 acc[kChains], a = _mm_set1_ps(0.5f);
    for (__m128& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
        asm("" : "+x"(a));
#pragma GCC unroll 12
        for (__m128& x : acc) x = _mm_add_ps(_mm_mul_ps(a, a), x);
    }
    for (__m128& x : acc) asm volatile("" ::"x"(x));
    return 2.0 * 4 * kChains * kRounds;
}

double int8_baseline() {  // widened to 16 bits beforehand
    __m128i acc[kChains], a = _mm_set1_epi16(3);
    for (__m128i& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (__m128i& x : acc) {
            asm("" : "+x"(a));
            x = _mm_add_epi32(x, _mm_madd_epi16(a, a));
        }
    }
    for (__m128i& x : acc) asm volatile("" ::"x"(x));
    return 2.0 * 8 * kChains * kRounds;
}

__attribute__((target("avx2,fma"))) double fp32_avx2() {
    __m256 acc[kChains], a = _mm256_set1_ps(0.5f);
    for (__m256& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (__m256& x : acc) x = _mm256_fmadd_ps(a, a, x);
        asm("" : "+x"(a));
    }
    for (__m256& x : acc) asm volatile("" ::"x"(x));
    return 2.0 * 8 * kChains * kRounds;
}

__attribute__((target("avx2"))) double int8_avx2() {
    __m256i acc[kChains], a = _mm256_set1_epi8(3);
    const __m256i ones = _mm256_set1_epi16(1);
    for (__m256i& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (__m256i& x : acc) {
            asm("" : "+x"(a));
            x = _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), ones));
        }
    }
    for (__m256i& x : acc) asm volatile("" ::"x"(x));
    return 2.0 * 32 * kChains * kRounds;
}

__attribute__((target("avx512f"))) double fp32_avx512() {
    __m512 acc[kChains], a = _mm512_set1_ps(0.5f);
    for (__m512& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (__m512& x : acc) x = _mm512_fmadd_ps(a, a, x);
        asm("" : "+v"(a));
    }
    for (__m512& x : acc) asm volatile("" ::"v"(x));
    return 2.0 * 16 * kChains * kRounds;
}

__attribute__((target("avx512f,avx512vnni"))) double int8_vnni() {
    __m512i acc[kChains], a = _mm512_set1_epi32(0x03030303);
    for (__m512i& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (__m512i& x : acc) asm("vpdpbusd %1, %1, %0" : "+v"(x) : "v"(a));
    }
    for (__m512i& x : acc) asm volatile("" ::"v"(x));
    return 2.0 * 64 * kChains * kRounds;
}

__attribute__((target("avx512f,avx512bf16"))) double bf16_avx512() {
    __m512 acc[kChains], a = _mm512_castsi512_ps(_mm512_set1_epi32(0x3f003f00));
    for (__m512& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (__m512& x : acc) asm("vdpbf16ps %1, %1, %0" : "+v"(x) : "v"(a));
    }
    for (__m512& x : acc) asm volatile("" ::"v"(x));
    return 2.0 * 32 * kChains * kRounds;
}

struct Peaks {
    const char* isa;
    double (*fp32)();
    double (*int8)();
    double (*bf16)();
};
constexpr Peaks kPeaks[] = {
    {"avx2", fp32_avx2, int8_avx2, fp32_avx2},
    {"avx512_vnni", fp32_avx512, int8_vnni, fp32_avx512},
    {"avx512_bf16", fp32_avx512, int8_vnni, bf16_avx512},
    {"baseline", fp32_baseline, int8_baseline, fp32_baseline},
};

#else

double fp32_plain() {
    float acc[kChains * 4] = {}, a = 0.5f;
    for (int64_t i = 0; i < kRounds; ++i) {
        asm("" : "+r"(a));
        for (float& x : acc) x = __builtin_fmaf(a, a, x);
    }
    for (float& x : acc) asm volatile("" ::"r"(x));
    return 2.0 * 4 * kChains * kRounds;
}

#if defined(__ARM_NEON)

double fp32_neon() {
    float32x4_t acc[kChains], a = vdupq_n_f32(0.5f);
    for (float32x4_t& x : acc) x = a;
    for (int64_t i = 0; i < kRounds; ++i) {
        asm("" : "+w"(a));
#pragma GCC unroll 12
        for (float32x4_t& x : acc) x = vfmaq_f32(x, a, a);
    }
    for (float32x4_t& x : acc) asm volatile("" ::"w"(x));
    return 2.0 * 4 * kChains * kRounds;
}

#if defined(__clang__)
__attribute__((target("dotprod")))
#else
__attribute__((target("arch=armv8.2-a+dotprod")))
#endif
double int8_neon_dotprod() {
    int32x4_t acc[kChains];
    const int8x16_t a = vdupq_n_s8(3);
    for (int32x4_t& x : acc) x = vdupq_n_s32(0);
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
        for (int32x4_t& x : acc) asm("sdot %0.4s, %1.16b, %1.16b" : "+w"(x) : "w"(a));
    }
    for (int32x4_t& x : acc) asm volatile("" ::"w"(x));
    return 2.0 * 16 * kChains * kRounds;
}

#endif

struct Peaks {
    const char* isa;
    double (*fp32)();
    double (*int8)();
    double (*bf16)();
};
constexpr Peaks kPeaks[] = {
#if defined(__ARM_NEON)
    {"neon_dotprod", fp32_neon, int8_neon_dotprod, fp32_neon},
#endif
    {"baseline", fp32_plain, fp32_plain, fp32_plain},
};

#endif

const Peaks& peaks_of(const std::string& isa) {
    for (const Peaks& peaks : kPeaks)
        if (isa == peaks.isa) return peaks;
    return *(std::end(kPeaks) - 1);
}

double peak(Pool& pool, double (*operations)()) {
    constexpr int kRepeats = 24;  // of about a millisecond each
    double best = 0;
    for (int i = 0; i < kRepeats; ++i) {
        double per_thread = 0;
        const auto start = Clock::now();
        pool.run([&](int thread) {
            const double done = operations();
            if (thread == 0) per_thread = done;
        });
        best = std::max(best, per_thread * pool.num_threads() / seconds_since(start));
    }
    return best;
}

// -- memory ------------------------------------------------------------------------------------------

constexpr size_t kLine = 64;
using Quarter = uint64_t __attribute__((vector_size(16)));  // of a line: a register of any machine

// `ahead`: bytes between what is read and what is asked for; 0 leaves that to the processor.
void read_lines(const uint8_t* begin, const uint8_t* end, size_t ahead) {
    Quarter a = {}, b = {}, c = {}, d = {};
    for (const uint8_t* p = begin; p < end; p += kLine) {
        if (ahead > 0) __builtin_prefetch(p + ahead);
        const auto* line = reinterpret_cast<const Quarter*>(p);
        a ^= line[0];
        b ^= line[1];
        c ^= line[2];
        d ^= line[3];
    }
    a ^= b ^ c ^ d;
    asm volatile("" ::"m"(a));
}

}  // namespace

double read_bandwidth(Pool& pool, size_t num_bytes, int repeats) {
    const size_t part = num_bytes / pool.num_threads() / kLine * kLine;
    if (part == 0) return 0;
    const Arena arena(part * pool.num_threads());
    // Memory that was never written is one page of zeros, and that is always in the cache.
    pool.run([&](int thread) { std::memset(arena.data() + thread * part, 1, part); });
    double best = 0;
    for (int i = 0; i < repeats; ++i) {
        for (const size_t ahead : {0, 2048, 8192}) {
            const auto start = Clock::now();
            pool.run([&](int thread) {
                const uint8_t* begin = arena.data() + thread * part;
                read_lines(begin, begin + part, ahead);
            });
            best = std::max(best, part * pool.num_threads() / seconds_since(start));
        }
    }
    return best;
}

double fp32_peak(Pool& pool, const std::string& isa) { return peak(pool, peaks_of(isa).fp32); }
double int8_peak(Pool& pool, const std::string& isa) { return peak(pool, peaks_of(isa).int8); }
double bf16_peak(Pool& pool, const std::string& isa) { return peak(pool, peaks_of(isa).bf16); }

double barrier_ns(Pool& pool, int rounds) {
    const auto start = Clock::now();
    pool.run([&](int) {
        for (int i = 0; i < rounds; ++i) pool.barrier();
    });
    return seconds_since(start) / rounds * 1e9;
}

}  // namespace duetto
