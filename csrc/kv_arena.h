// The KV of all layers, in one arena: [layer][block], a block laid out by the kernels that made it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "pool.h"

namespace duetto {

// Bytes of one block of one layer. Throws std::invalid_argument for what no kernel takes.
int64_t kv_block_bytes(const Kernels& kernels, KvFormat format, int64_t block_size,
                       int64_t num_kv_heads, int64_t head_dim);

// How the keys of one layer are turned while they are moved: cos and sin, [tokens, half].
struct KvTurn {
    int64_t half;  // pairs that are turned; 0: none
    const float *cos, *sin;
};

class KvArena {
public:
    // layers: (num_kv_heads, head_dim) of each. Throws std::invalid_argument, std::bad_alloc.
    KvArena(const Kernels& kernels, KvFormat format, int64_t num_blocks, int64_t block_size,
            const std::vector<std::pair<int64_t, int64_t>>& layers);

    const Kernels& kernels() const { return kernels_; }
    KvFormat format() const { return format_; }
    int64_t num_blocks() const { return num_blocks_; }
    int64_t block_size() const { return block_size_; }
    const std::vector<KvLayer>& layers() const { return layers_; }
    int64_t num_bytes() const { return static_cast<int64_t>(memory_.num_bytes()); }

    // The KV of `count` tokens into other slots too, on the pool's threads; one turn for each layer.
    // Throws std::invalid_argument for a slot outside the arena, one that is both read and written,
    // one that is written twice, and more pairs than a head has.
    void move(Pool& pool, const int32_t* from, const int32_t* to, int64_t count,
              const std::vector<KvTurn>& turns) const;

    // The KV in `count` slots of a layer as fp32, to keys and values: [count, heads, dim] each. Throws
    // std::invalid_argument for a layer or a slot that is not there.
    void read(Pool& pool, int64_t layer, const int32_t* slots, int64_t count, float* keys,
              float* values) const;

    // Throws std::invalid_argument if there is no such layer.
    const KvLayer& layer(int64_t number) const;

private:
    void check_move(const int32_t* from, const int32_t* to, int64_t count,
                    const std::vector<KvTurn>& turns) const;

    const Kernels& kernels_;
    KvFormat format_;
    int64_t num_blocks_, block_size_;
    std::vector<KvLayer> layers_;
    Arena memory_;
};

}  // namespace duetto
