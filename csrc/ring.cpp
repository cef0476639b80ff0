#include "ring.h"

#include <sched.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <bit>
#include <chrono>

#include "refuse.h"

namespace duetto {

namespace {

using Clock = std::chrono::steady_clock;

// A piece is copied while the other side copies the one before. Smaller ones wait more often, larger
// ones longer.
constexpr int64_t kPiece = 128 << 10;
// The other side needs some microseconds for a piece, and some more between two calls; to be woken
// takes as long. One that needs longer may want this processor: it gets it by each yield, too.
constexpr auto kYield = std::chrono::microseconds(200);
constexpr long kSleepNs = 10'000'000;  // at most, between two looks at `stop`

void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
    timespec time{0, kSleepNs};
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &time, nullptr, 0);
#else
    time.tv_nsec = 50'000;
    if (word.load() == seen) nanosleep(&time, nullptr);
#endif
}

void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

uint8_t* aligned(uint8_t* memory) {
    require(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "ring: is not aligned to 64 bytes");
    return memory;
}

}  // namespace

Ring::Ring(uint8_t* memory, int64_t num_bytes)
    : written_(*reinterpret_cast<Count*>(aligned(memory))),
      read_(*reinterpret_cast<Count*>(memory + 128)),
      data_(memory + kHeaderBytes),
      size_(num_bytes - kHeaderBytes) {
    require(size_ >= kHeaderBytes && std::has_single_bit(static_cast<uint64_t>(size_)),
            "ring: needs 4096 bytes, and a power of two behind them");
}

// Until the count is another one; false if it stays.
bool Ring::wait(Count& count, uint64_t seen, double patience_s, const std::atomic<uint32_t>& stop) {
    const auto start = Clock::now();
    const auto most = std::chrono::duration<double>(patience_s);
    for (;;) {
        const uint32_t changes = count.changes.load();
        if (count.bytes.load(std::memory_order_acquire) != seen) return true;
        if (stop.load(std::memory_order_acquire) != 0) return false;
        const auto waited = Clock::now() - start;
        if (waited > most) return false;
        if (waited < kYield) {
            sched_yield();
            continue;
        }
        // Sequentially consistent, here and in tell(): it sees the sleeper, or the sleeper what
        // has changed.
        count.sleepers.store(1);
        if (count.bytes.load() == seen) sleep_while(count.changes, changes);
        count.sleepers.store(0);
    }
}

void Ring::tell(Count& count, uint64_t bytes) {
    count.bytes.store(bytes);
    count.changes.fetch_add(1);
    if (count.sleepers.load() != 0) wake(count.changes);
}

int64_t Ring::put(const RowStream& rows, int64_t start, double patience_s,
                  const std::atomic<uint32_t>& stop) {
    const int64_t end = rows.num_bytes();
    uint64_t written = written_.bytes.load();
    int64_t at = start;
    while (at < end) {
        if (stop.load(std::memory_order_acquire) != 0) break;
        const uint64_t read = read_.bytes.load(std::memory_order_acquire);
        const uint64_t held = written - read;
        if (held > static_cast<uint64_t>(size_)) return kBroken;
        const int64_t room = size_ - static_cast<int64_t>(held);
        if (room < std::min({end - at, kPiece, size_})) {
            if (!wait(read_, read, patience_s, stop)) break;
            continue;
        }
        const auto place = static_cast<int64_t>(written & (size_ - 1));
        const int64_t count = std::min({room, end - at, size_ - place, kPiece});
        rows.read(at, data_ + place, count);
        at += count;
        written += count;
        tell(written_, written);
    }
    return at - start;
}

int64_t Ring::take(const RowStream* rows, int64_t start, int64_t count, double patience_s,
                   const std::atomic<uint32_t>& stop) {
    uint64_t read = read_.bytes.load();
    int64_t at = start;
    const int64_t end = start + count;
    while (at < end) {
        if (stop.load(std::memory_order_acquire) != 0) break;
        const uint64_t written = written_.bytes.load(std::memory_order_acquire);
        const uint64_t held = written - read;
        if (held > static_cast<uint64_t>(size_)) return kBroken;
        if (held == 0) {
            if (!wait(written_, written, patience_s, stop)) break;
            continue;
        }
        const auto place = static_cast<int64_t>(read & (size_ - 1));
        const int64_t length =
            std::min({static_cast<int64_t>(held), end - at, size_ - place, kPiece});
        if (rows != nullptr) rows->write(at, data_ + place, length);
        at += length;
        read += length;
        tell(read_, read);
    }
    return at - start;
}

}  // namespace duetto
