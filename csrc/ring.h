// A ring of bytes in memory that two processes share: one writes, the other reads. What of it one
// side reads is untrusted by it: a count that cannot be is an error, never an access outside.
// Knows no Python, no process and not what the bytes are.
#pragma once

#include <atomic>
#include <cstdint>

#include "rows.h"

namespace duetto {

class Ring {
public:
    static constexpr int64_t kHeaderBytes = 4096;
    enum Outcome : int64_t { kStopped = -1, kBroken = -2 };

    // `memory`: kHeaderBytes, and behind it the bytes of the ring, a power of two; zeros at first.
    // Throws std::invalid_argument for another size.
    Ring(uint8_t* memory, int64_t num_bytes);

    // Bytes [start, ...) of the rows, until all are in the ring, nothing has moved for `patience_s`,
    // or `stop` is not 0: how many went; kBroken for counts that cannot be.
    int64_t put(const RowStream& rows, int64_t start, double patience_s,
                const std::atomic<uint32_t>& stop);

    // The other way; without `rows`, `count` bytes are thrown away.
    int64_t take(const RowStream* rows, int64_t start, int64_t count, double patience_s,
                 const std::atomic<uint32_t>& stop);

private:
    struct alignas(64) Count {
        std::atomic<uint64_t> bytes;  // since the start
        std::atomic<uint32_t> changes;  // what is slept on
        std::atomic<uint32_t> sleepers;
    };
    static_assert(std::atomic<uint64_t>::is_always_lock_free);

    static bool wait(Count& count, uint64_t seen, double patience_s,
                     const std::atomic<uint32_t>& stop);
    static void tell(Count& count, uint64_t bytes);

    Count& written_;
    Count& read_;
    uint8_t* data_;
    int64_t size_;
};

}  // namespace duetto
