#include "arena.h"

#include <sys/mman.h>

#include <limits>
#include <new>

namespace duetto {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmall = size_t{1} << 20;  // not worth a huge page
constexpr size_t kCacheLine = 64;  // and 64 is aligned enough; the system maps whole pages

}  // namespace

Arena::Arena(size_t num_bytes) : num_bytes_(num_bytes) {
    if (num_bytes == 0) return;
    const size_t alignment = num_bytes < kSmall ? kCacheLine : kHugePage;
    if (num_bytes > std::numeric_limits<size_t>::max() / 2) throw std::bad_alloc();
    mapped_bytes_ = num_bytes + (alignment == kHugePage ? kHugePage : 0);
    mapped_ =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) {
        mapped_ = nullptr;
        throw std::bad_alloc();
    }
    const uintptr_t start = reinterpret_cast<uintptr_t>(mapped_);
    data_ = reinterpret_cast<uint8_t*>((start + alignment - 1) / alignment * alignment);
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(data_, num_bytes, MADV_HUGEPAGE);  // a wish: may be refused
#endif
}

Arena::~Arena() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
}

}  // namespace duetto
