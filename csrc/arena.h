// Large memory: zeroed, aligned to 2 MiB, in huge pages where the system gives them. Weights are read
// once a step from end to end, and with small pages the walks through the page tables show.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace duetto {

class Arena {
public:
    Arena() = default;
    explicit Arena(size_t num_bytes);  // throws std::bad_alloc
    ~Arena();
    Arena(Arena&& other) noexcept { swap(other); }
    Arena& operator=(Arena&& other) noexcept {
        swap(other);
        return *this;
    }

    uint8_t* data() const { return data_; }
    size_t num_bytes() const { return num_bytes_; }

private:
    void swap(Arena& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(num_bytes_, other.num_bytes_);
        std::swap(mapped_, other.mapped_);
        std::swap(mapped_bytes_, other.mapped_bytes_);
    }

    uint8_t* data_ = nullptr;
    size_t num_bytes_ = 0;
    void* mapped_ = nullptr;  // what was mapped to find an aligned part in it
    size_t mapped_bytes_ = 0;
};

}  // namespace duetto
