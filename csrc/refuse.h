// Errors of whoever calls: what was wrong, and what would be accepted.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace duetto {

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

inline void require(bool holds, const char* what) {
    if (!holds) refuse(what);
}

inline void same_width(const char* operation, const char* name, int64_t width, int64_t wanted) {
    if (width != wanted)
        refuse(std::string(operation) + ": " + name + " is " + std::to_string(width) +
               " columns wide, not " + std::to_string(wanted));
}

}  // namespace duetto
