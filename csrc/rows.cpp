#include "rows.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "refuse.h"

namespace duetto {

namespace {

constexpr int kMostSpans = 1024;  // IOV_MAX of Linux

}  // namespace

RowStream::RowStream(std::vector<RowArray> arrays, const int32_t* blocks, int64_t num_blocks)
    : arrays_(std::move(arrays)), blocks_(blocks), num_blocks_(num_blocks) {
    for (const RowArray& array : arrays_) {
        require(array.row_bytes > 0, "rows: an array whose rows have no bytes");
        block_bytes_ += array.row_bytes;
        for (int64_t i = 0; i < num_blocks; ++i)
            if (blocks[i] < 0 || blocks[i] >= array.num_blocks)
                refuse("rows: block " + std::to_string(blocks[i]) + " is not in an arena of " +
                       std::to_string(array.num_blocks));
    }
    require(!arrays_.empty(), "rows: no arrays");
}

template <class Take>
void RowStream::each(int64_t start, int64_t count, Take take) const {
    if (count <= 0 || start < 0 || start >= num_bytes()) return;
    int64_t block = start / block_bytes_, offset = start % block_bytes_;
    size_t array = 0;
    while (offset >= arrays_[array].row_bytes) offset -= arrays_[array++].row_bytes;
    count = std::min(count, num_bytes() - start);
    while (count > 0) {
        const RowArray& own = arrays_[array];
        const int64_t length = std::min(count, own.row_bytes - offset);
        if (!take(own.data + blocks_[block] * own.row_bytes + offset, length)) return;
        count -= length;
        offset = 0;
        if (++array == arrays_.size()) array = 0, ++block;
    }
}

int RowStream::spans(int64_t start, int64_t limit, iovec* out, int most) const {
    int filled = 0;
    each(start, limit, [&](uint8_t* data, int64_t length) {
        out[filled++] = {data, static_cast<size_t>(length)};
        return filled < most;
    });
    return filled;
}

void RowStream::read(int64_t start, uint8_t* out, int64_t count) const {
    each(start, count, [&](const uint8_t* data, int64_t length) {
        std::memcpy(out, data, length);
        out += length;
        return true;
    });
}

void RowStream::write(int64_t start, const uint8_t* data, int64_t count) const {
    each(start, count, [&](uint8_t* place, int64_t length) {
        std::memcpy(place, data, length);
        data += length;
        return true;
    });
}

void RowStream::copy_to(const RowStream& to) const {
    int64_t at = 0;
    each(0, num_bytes(), [&](const uint8_t* data, int64_t length) {
        to.write(at, data, length);
        at += length;
        return true;
    });
}

int64_t RowStream::send(int fd, int64_t start, int64_t limit) const {
    iovec parts[kMostSpans];
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = spans(start, limit, parts, kMostSpans);
    const ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    return sent < 0 ? -errno : sent;
}

int64_t RowStream::receive(int fd, int64_t start, int64_t limit) const {
    iovec parts[kMostSpans];
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = spans(start, limit, parts, kMostSpans);
    const ssize_t came = recvmsg(fd, &message, 0);
    return came < 0 ? -errno : came;
}

}  // namespace duetto
