// What this machine gives: the yardsticks that kernels are held against. Measured, because neither
// clock nor memory speed can be asked for, and both change with the neighbours.
#pragma once

#include <cstddef>
#include <string>

#include "pool.h"

namespace duetto {

// Bytes per second that all threads read together from memory of `num_bytes`; the best of `repeats`
// runs. Only larger than the last cache is it memory that is measured.
double read_bandwidth(Pool& pool, size_t num_bytes, int repeats);

// Operations per second (a multiply-add is two) of all threads on registers alone, with the
// instructions that the named set multiplies with. bf16 is fp32 where a set has no instruction for it.
double fp32_peak(Pool& pool, const std::string& isa);
double int8_peak(Pool& pool, const std::string& isa);
double bf16_peak(Pool& pool, const std::string& isa);

// What one barrier of the pool costs, in nanoseconds: the mean over `rounds`.
double barrier_ns(Pool& pool, int rounds);

}  // namespace duetto
