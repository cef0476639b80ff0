#include "kv_arena.h"

#include <limits>
#include <new>
#include <stdexcept>

namespace duetto {

KvArena::KvArena(const Kernels& kernels, KvFormat format, int64_t num_blocks, int64_t block_size,
                 const std::vector<std::pair<int64_t, int64_t>>& layers)
    : kernels_(kernels), format_(format), num_blocks_(num_blocks), block_size_(block_size) {
    if (num_blocks < 1 || block_size < 1 ||
        num_blocks > std::numeric_limits<int32_t>::max() / block_size)  // a slot is an int32
        throw std::invalid_argument("a KV arena of " + std::to_string(num_blocks) + " blocks of " +
                                    std::to_string(block_size) + " slots: needs 1 to 2^31 - 1 slots");
    int64_t total = 0;
    for (const auto& [heads, dim] : layers) {
        if (heads < 1 || dim < 1 || heads > 1 << 16 || dim > 1 << 16)
            throw std::invalid_argument("KV of " + std::to_string(heads) + " heads of " +
                                        std::to_string(dim) + " numbers: both must be 1 to 65536");
        const auto size = static_cast<int32_t>(block_size), h = static_cast<int32_t>(heads),
                   d = static_cast<int32_t>(dim);
        const int64_t block_bytes = kernels.kv_block_bytes(format, size, h, d);
        if (block_bytes > (std::numeric_limits<int64_t>::max() / 2 - total) / num_blocks)
            throw std::bad_alloc();
        layers_.push_back({nullptr, format, size, h, d, block_bytes});
        total += block_bytes * num_blocks;
    }
    memory_ = Arena(static_cast<size_t>(total));
    uint8_t* next = memory_.data();
    for (KvLayer& layer : layers_) {
        layer.data = next;
        next += layer.block_bytes * num_blocks;
    }
}

}  // namespace duetto
