// Bytes of a KV arena's blocks as one stream: of each block, its rows in all arrays, one after the
// other. What KV links copy, send and receive. Knows no Python, and not what a row means.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

namespace duetto {

struct RowArray {
    uint8_t* data;  // [num_blocks, row_bytes]
    int64_t num_blocks, row_bytes;
};

class RowStream {
public:
    // Throws std::invalid_argument for a block that is not in every array, or no bytes of a block.
    RowStream(std::vector<RowArray> arrays, const int32_t* blocks, int64_t num_blocks);

    int64_t num_bytes() const { return num_blocks_ * block_bytes_; }

    // The next spans from byte `start`, at most `limit` bytes and `most` spans; how many.
    int spans(int64_t start, int64_t limit, iovec* out, int most) const;

    // `count` bytes from byte `start`. The caller keeps within num_bytes().
    void read(int64_t start, uint8_t* out, int64_t count) const;
    void write(int64_t start, const uint8_t* data, int64_t count) const;

    // To as many bytes elsewhere.
    void copy_to(const RowStream& to) const;

    // One call of the system, of at most `limit` bytes: how many went, 0 at the end of what comes
    // in, or -errno.
    int64_t send(int fd, int64_t start, int64_t limit) const;
    int64_t receive(int fd, int64_t start, int64_t limit) const;

private:
    template <class Copy>
    void each(int64_t start, int64_t count, Copy copy) const;

    std::vector<RowArray> arrays_;
    const int32_t* blocks_;
    int64_t num_blocks_, block_bytes_ = 0;
};

}  // namespace duetto
