// What a test program needs: a check that says what was wrong, and goes on.
#pragma once

#include <cstdio>

// Sanitized or emulated code is many times slower: tests then repeat less, and leave out no kind of
// case.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(DUETTO_EMULATED)
constexpr bool kSlow = true;
#else
constexpr bool kSlow = false;
#endif

inline int failures = 0;

// CHECK(condition) or CHECK(condition, "format", ...), where the format tells the case.
#define CHECK(condition, ...)                                                   \
    do {                                                                        \
        if (!(condition) && ++failures <= 20) {                                 \
            std::printf("%s:%d: not true: %s", __FILE__, __LINE__, #condition); \
            __VA_OPT__(std::printf(": "); std::printf(__VA_ARGS__);)            \
            std::printf("\n");                                                  \
        }                                                                       \
    } while (false)

inline int report(const char* name) {
    std::printf("%s: %s\n", name, failures == 0 ? "ok" : "FAILED");
    return failures == 0 ? 0 : 1;
}
