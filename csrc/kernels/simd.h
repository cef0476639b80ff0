// A vector of floats as wide as the instruction set that this translation unit is compiled for.
// Included inside that instruction set's own namespace only through kernels/isa.cpp, so that no
// inline function compiled for one set can be chosen by the linker for another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DUETTO_INLINE static inline __attribute__((always_inline))

namespace duetto {
namespace DUETTO_ISA {

// DUETTO_EMULATE_512: tests build the 512-bit code for machines without it, as the compiler's generic
// vectors and plain C (only what needs nothing but this file and kernels/linear.h).
#if defined(__AVX512F__) || defined(DUETTO_EMULATE_512)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

// GCC's and Clang's vector extensions: operators come with the type.
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef int16_t vs __attribute__((vector_size(kLanes * 4)));  // two to a lane
typedef int8_t vb __attribute__((vector_size(kLanes * 4)));   // four to a lane

DUETTO_INLINE vf set1(float x) { return x - vf{}; }  // -0 stays -0, so that no addition is left
DUETTO_INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
DUETTO_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// a * b + c, rounded once where the set has it (all but the x86 baseline)
DUETTO_INLINE vf fma(vf a, vf b, vf c) {
#if defined(DUETTO_EMULATE_512)
    for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#elif defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

DUETTO_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
DUETTO_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

DUETTO_INLINE vi set1_int(int32_t x) { return vi{} + x; }
DUETTO_INLINE vi load_int(const void* p) {
    vi v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
DUETTO_INLINE vi broadcast_word(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return set1_int(word);
}
DUETTO_INLINE void store_int(void* p, vi v) { std::memcpy(p, &v, sizeof v); }
DUETTO_INLINE vf to_f32(vi x) { return __builtin_convertvector(x, vf); }
// the first `count` (< kLanes) floats at p, then zeros
DUETTO_INLINE vf load_first(const float* p, int64_t count) {
    vf v = {};
    std::memcpy(&v, p, (size_t)count * 4);
    return v;
}
DUETTO_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

DUETTO_INLINE vf bf16_to_f32(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
DUETTO_INLINE vf load_bf16(const uint16_t* p) {  // GCC 12 widens 16 bits to 32 in five instructions
#if defined(__AVX512F__) && !defined(DUETTO_EMULATE_512)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__) && !defined(DUETTO_EMULATE_512)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vh v;
    std::memcpy(&v, p, sizeof v);
    return bf16_to_f32(v);
#endif
}
// round to nearest, ties to even; NaN stays NaN
DUETTO_INLINE uint16_t f32_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace DUETTO_ISA
}  // namespace duetto
