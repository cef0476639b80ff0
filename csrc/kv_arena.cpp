#include "kv_arena.h"

#include <algorithm>
#include <limits>
#include <new>
#include <string>

#include "refuse.h"

namespace duetto {

namespace {

constexpr int64_t kMostSlots = int64_t{1} << 31;  // a slot is an int32
constexpr int64_t kMost = 1 << 16;                // heads, and numbers of one

}  // namespace

int64_t kv_block_bytes(const Kernels& kernels, KvFormat format, int64_t block_size,
                       int64_t num_kv_heads, int64_t head_dim) {
    using std::to_string;
    if (block_size < 1 || block_size >= kMostSlots)
        refuse("blocks of " + to_string(block_size) + " tokens: must be 1 to 2^31 - 1");
    if (num_kv_heads < 1 || num_kv_heads > kMost || head_dim < 1 || head_dim > kMost ||
        num_kv_heads * head_dim > kMost * 256)  // what no product of these overflows with
        refuse("KV of " + to_string(num_kv_heads) + " heads of " + to_string(head_dim) +
               " numbers: both must be 1 to 65536, and 2^24 numbers together at most");
    return kernels.kv_block_bytes(format, static_cast<int32_t>(block_size),
                                  static_cast<int32_t>(num_kv_heads),
                                  static_cast<int32_t>(head_dim));
}

KvArena::KvArena(const Kernels& kernels, KvFormat format, int64_t num_blocks, int64_t block_size,
                 const std::vector<std::pair<int64_t, int64_t>>& layers)
    : kernels_(kernels), format_(format), num_blocks_(num_blocks), block_size_(block_size) {
    if (num_blocks < 1 || block_size < 1 || num_blocks > kMostSlots / block_size)
        refuse("a KV arena of " + std::to_string(num_blocks) + " blocks of " +
               std::to_string(block_size) + " slots: must have 1 to 2^31 slots");
    int64_t total = 0;
    for (const auto& [heads, dim] : layers) {
        const int64_t block_bytes = kv_block_bytes(kernels, format, block_size, heads, dim);
        const auto size = static_cast<int32_t>(block_size), h = static_cast<int32_t>(heads),
                   d = static_cast<int32_t>(dim);
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

void KvArena::move(Pool& pool, const int32_t* from, const int32_t* to, int64_t count,
                   const std::vector<KvTurn>& turns) const {
    check_move(from, to, count, turns);
    size_t widest = 0;
    for (const KvLayer& layer : layers_)
        widest = std::max(widest, static_cast<size_t>(layer.head_dim));
    const int num_threads = pool.num_threads();
    std::vector<float> rows(widest * static_cast<size_t>(num_threads));  // `work` must not throw
    pool.run([&](int thread) {
        const int64_t begin = count * thread / num_threads,
                      end = count * (thread + 1) / num_threads;
        float* row = rows.data() + widest * static_cast<size_t>(thread);
        for (size_t layer = 0; layer < layers_.size(); ++layer) {
            const KvTurn& turn = turns[layer];
            kernels_.move_kv(&layers_[layer], from, to, turn.half, turn.cos, turn.sin, begin, end,
                             row);
        }
    });
}

void KvArena::read(Pool& pool, int64_t layer, const int32_t* slots, int64_t count, float* keys,
                   float* values) const {
    const KvLayer& kv = this->layer(layer);
    const int64_t num_slots = num_blocks_ * block_size_;
    for (int64_t i = 0; i < count; ++i)
        if (slots[i] < 0 || slots[i] >= num_slots)
            refuse("KV slot " + std::to_string(slots[i]) + " is not there: must be 0 to " +
                   std::to_string(num_slots - 1));
    const int num_threads = pool.num_threads();
    pool.run([&](int thread) {
        kernels_.read_kv(&kv, slots, count * thread / num_threads,
                         count * (thread + 1) / num_threads, keys, values);
    });
}

const KvLayer& KvArena::layer(int64_t number) const {
    if (number < 0 || number >= static_cast<int64_t>(layers_.size()))
        refuse("the KV arena has no layer " + std::to_string(number));
    return layers_[number];
}

void KvArena::check_move(const int32_t* from, const int32_t* to, int64_t count,
                         const std::vector<KvTurn>& turns) const {
    using std::to_string;
    if (turns.size() != layers_.size())
        refuse(to_string(turns.size()) + " turns for " + to_string(layers_.size()) + " layers");
    for (size_t layer = 0; layer < turns.size(); ++layer)
        if (turns[layer].half < 0 || 2 * turns[layer].half > layers_[layer].head_dim)
            refuse("a turn of " + to_string(turns[layer].half) + " pairs: layer " +
                   to_string(layer) + " has heads of " + to_string(layers_[layer].head_dim));
    const int64_t num_slots = num_blocks_ * block_size_;
    std::vector<int32_t> written(to, to + count);
    std::sort(written.begin(), written.end());
    if (std::adjacent_find(written.begin(), written.end()) != written.end())
        refuse("a KV slot is written twice by one move");
    for (int64_t i = 0; i < count; ++i) {
        if (from[i] < 0 || from[i] >= num_slots || to[i] < 0 || to[i] >= num_slots)
            refuse("a move from KV slot " + to_string(from[i]) + " to " + to_string(to[i]) +
                   ": must be 0 to " + to_string(num_slots - 1));
        if (std::binary_search(written.begin(), written.end(), from[i]))
            refuse("KV slot " + to_string(from[i]) + " is both read and written by one move");
    }
}

}  // namespace duetto
