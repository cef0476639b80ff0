// XXH64 (Yann Collet, xxHash specification 0.1.1): fast enough to check a cache as it is read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace duetto {

uint64_t xxh64(const uint8_t* data, size_t num_bytes);  // seed 0

}  // namespace duetto
