#include "rows.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "refuse.h"

namespace duetto {

namespace {

constexpr int kMostSpans = 1024;  // IOV_MAX of Linux
#if defined(MSG_NOSIGNAL)
constexpr int kSendFlags = MSG_NOSIGNAL;
#else
constexpr int kSendFlags = 0;  // Python ignores the signal
#endif

// Arenas and rings lie alike in their pages, and there glibc's memcpy, which is one instruction
// (`rep movsb`) for some KiB, takes four times as long on Zen 3 and 4. What is copied is not read
// soon, or by another core: it is written past the caches, which spares reading the lines first and
// fetching them from the other core's cache.
#if defined(__x86_64__)
constexpr int64_t kLeastStreamed = 256;

void copy_bytes(uint8_t* to, const uint8_t* from, int64_t count) {
    if (count < kLeastStreamed) {
        std::memcpy(to, from, count);
        return;
    }
    const int64_t head = -reinterpret_cast<uintptr_t>(to) & 63;
    std::memcpy(to, from, head);
    to += head, from += head, count -= head;
    for (; count >= 64; to += 64, from += 64, count -= 64) {
        const auto* source = reinterpret_cast<const __m128i*>(from);
        auto* line = reinterpret_cast<__m128i*>(to);
        const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1),
                      c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(line, a);
        _mm_stream_si128(line + 1, b);
        _mm_stream_si128(line + 2, c);
        _mm_stream_si128(line + 3, d);
    }
    std::memcpy(to, from, count);
}

// Before others are told.
void end_streams() { _mm_sfence(); }
#else
void copy_bytes(uint8_t* to, const uint8_t* from, int64_t count) { std::memcpy(to, from, count); }

void end_streams() {}
#endif

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
        copy_bytes(out, data, length);
        out += length;
        return true;
    });
    end_streams();
}

void RowStream::write(int64_t start, const uint8_t* data, int64_t count) const {
    each(start, count, [&](uint8_t* place, int64_t length) {
        copy_bytes(place, data, length);
        data += length;
        return true;
    });
    end_streams();
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
    const ssize_t sent = sendmsg(fd, &message, kSendFlags);
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
