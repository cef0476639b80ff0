#include "cpu_features.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

#include <asm/hwcap.h>
#endif

namespace duetto {

std::vector<std::string> cpu_features() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    // GCC's and Clang's own probe: CPUID together with XGETBV, so a feature whose registers the
    // operating system does not save is not reported.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2")) names.emplace_back("sse4_2");
    if (__builtin_cpu_supports("avx2")) names.emplace_back("avx2");
    if (__builtin_cpu_supports("fma")) names.emplace_back("fma");
    if (__builtin_cpu_supports("f16c")) names.emplace_back("f16c");
    if (__builtin_cpu_supports("avx512f")) names.emplace_back("avx512f");
    if (__builtin_cpu_supports("avx512bw")) names.emplace_back("avx512bw");
    if (__builtin_cpu_supports("avx512dq")) names.emplace_back("avx512dq");
    if (__builtin_cpu_supports("avx512vl")) names.emplace_back("avx512vl");
    if (__builtin_cpu_supports("avx512vnni")) names.emplace_back("avx512_vnni");
    if (__builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512_bf16");
#elif defined(__aarch64__)
    names.emplace_back("neon");  // part of the architecture's baseline
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) names.emplace_back("asimddp");
#elif defined(__APPLE__)
    names.emplace_back("asimddp");  // every one of Apple's own
#endif
#endif
    return names;
}

}  // namespace duetto
