// Rows through a ring and from arena to arena: equal bytes, nothing beside them, and, under TSan, a
// writer and a reader that order all by the counts alone.
#include "ring.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"

using duetto::Ring;
using duetto::RowArray;
using duetto::RowStream;

namespace {

struct Rows {  // an arena of some arrays, and blocks of it in any order
    Rows(std::vector<int64_t> sizes, int32_t num_blocks, int32_t used, unsigned seed)
        : blocks(num_blocks) {
        std::mt19937 random(seed);
        std::iota(blocks.begin(), blocks.end(), 0);
        std::shuffle(blocks.begin(), blocks.end(), random);
        blocks.resize(used);
        for (const int64_t size : sizes) {
            std::vector<uint8_t>& own = memory.emplace_back(size * num_blocks);
            for (uint8_t& byte : own) byte = static_cast<uint8_t>(random());
            arrays.push_back({own.data(), num_blocks, size});
        }
    }
    RowStream stream() const {
        return RowStream(arrays, blocks.data(), static_cast<int64_t>(blocks.size()));
    }
    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> all;
        for (const int32_t block : blocks)
            for (const RowArray& array : arrays)
                all.insert(all.end(), array.data + block * array.row_bytes,
                           array.data + (block + 1) * array.row_bytes);
        return all;
    }
    std::vector<std::vector<uint8_t>> memory;
    std::vector<RowArray> arrays;
    std::vector<int32_t> blocks;
};

struct alignas(64) Shared {
    uint8_t bytes[Ring::kHeaderBytes + 8192] = {};
    Ring ring() { return Ring(bytes, sizeof bytes); }
};

void all_arrives(const std::vector<int64_t>& sizes, int32_t num_blocks, unsigned seed) {
    const Rows from(sizes, num_blocks, num_blocks - 1, seed);
    Rows to(sizes, num_blocks + 2, num_blocks - 1, seed + 1);
    const RowStream source = from.stream(), places = to.stream();
    const auto shared = std::make_unique<Shared>();
    const std::atomic<uint32_t> stop{0};
    std::thread writer([&] {
        Ring ring = shared->ring();
        for (int turn = 0; turn < 2; ++turn)
            CHECK(ring.put(source, 0, 60, stop) == source.num_bytes());
    });
    Ring ring = shared->ring();
    CHECK(ring.take(nullptr, 0, source.num_bytes(), 60, stop) == source.num_bytes());
    CHECK(ring.take(&places, 0, places.num_bytes(), 60, stop) == places.num_bytes());
    writer.join();
    CHECK(from.bytes() == to.bytes(), "seed %u", seed);
}

void copies_are_equal(const std::vector<int64_t>& sizes, unsigned seed) {
    const Rows from(sizes, 9, 7, seed);
    Rows to(sizes, 8, 7, seed + 1);
    const Rows before = to;
    from.stream().copy_to(to.stream());
    CHECK(from.bytes() == to.bytes(), "seed %u", seed);
    for (int32_t block = 0; block < 8; ++block)
        for (size_t i = 0; i < sizes.size(); ++i)
            if (std::find(to.blocks.begin(), to.blocks.end(), block) == to.blocks.end())
                CHECK(std::memcmp(to.memory[i].data() + block * sizes[i],
                                  before.memory[i].data() + block * sizes[i], sizes[i]) == 0);
}

void waiting_ends() {
    const Rows rows({5000}, 8, 8, 1);
    const auto shared = std::make_unique<Shared>();
    std::atomic<uint32_t> stop{0};
    Ring ring = shared->ring();
    CHECK(ring.put(rows.stream(), 0, 0.001, stop) == 8192);  // nobody reads
    std::thread stopper([&] { stop.store(1); });
    CHECK(ring.put(rows.stream(), 8192, 60, stop) == 0);
    stopper.join();
}

void what_cannot_be_is_refused() {
    const auto refused = [](auto call) {
        try {
            call();
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    Rows rows({64}, 4, 4, 1);
    for (const int32_t wrong : {-1, 4, INT32_MAX, INT32_MIN}) {
        rows.blocks[2] = wrong;
        CHECK(refused([&] { rows.stream(); }), "block %d", wrong);
    }
    CHECK(refused([] { RowStream({}, nullptr, 0); }));
    Shared shared;
    CHECK(refused([&] { Ring(shared.bytes, sizeof shared.bytes - 1); }));
    CHECK(refused([&] { Ring(shared.bytes + 1, sizeof shared.bytes - 4096); }));
}

}  // namespace

int main() {
    const std::vector<std::vector<int64_t>> shapes = {
        {1}, {64}, {255, 257}, {4096, 96, 4096, 96}, {100'000}, {300, 1, 777}};
    for (unsigned seed = 0; seed < (kSlow ? 3 : 20); ++seed)
        for (const std::vector<int64_t>& sizes : shapes) {
            all_arrives(sizes, 33, 10 * seed);
            copies_are_equal(sizes, 10 * seed + 5);
        }
    waiting_ends();
    what_cannot_be_is_refused();
    return report("ring");
}
