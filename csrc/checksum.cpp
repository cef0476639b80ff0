#include "checksum.h"

#include <bit>
#include <cstring>
#include <initializer_list>

namespace duetto {

namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F,
                   kPrime3 = 0x165667B19E3779F9, kPrime4 = 0x85EBCA77C2B2AE63,
                   kPrime5 = 0x27D4EB2F165667C5;

template <class T>
uint64_t read(const uint8_t* p) {  // little-endian, as every machine that we run on is
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

uint64_t round(uint64_t lane, uint64_t input) {
    return std::rotl(lane + input * kPrime2, 31) * kPrime1;
}

uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ round(0, lane)) * kPrime1 + kPrime4; }

}  // namespace

uint64_t xxh64(const uint8_t* p, size_t num_bytes) {
    const uint8_t* const end = p + num_bytes;
    uint64_t hash = kPrime5;
    if (num_bytes >= 32) {
        uint64_t a = kPrime1 + kPrime2, b = kPrime2, c = 0, d = 0 - kPrime1;
        for (; end - p >= 32; p += 32) {
            a = round(a, read<uint64_t>(p));
            b = round(b, read<uint64_t>(p + 8));
            c = round(c, read<uint64_t>(p + 16));
            d = round(d, read<uint64_t>(p + 24));
        }
        hash = std::rotl(a, 1) + std::rotl(b, 7) + std::rotl(c, 12) + std::rotl(d, 18);
        for (uint64_t lane : {a, b, c, d}) hash = merge(hash, lane);
    }
    hash += num_bytes;
    for (; end - p >= 8; p += 8)
        hash = std::rotl(hash ^ round(0, read<uint64_t>(p)), 27) * kPrime1 + kPrime4;
    if (end - p >= 4) {
        hash = std::rotl(hash ^ (read<uint32_t>(p) * kPrime1), 23) * kPrime2 + kPrime3;
        p += 4;
    }
    for (; p < end; ++p) hash = std::rotl(hash ^ (*p * kPrime5), 11) * kPrime1;
    hash = (hash ^ (hash >> 33)) * kPrime2;
    hash = (hash ^ (hash >> 29)) * kPrime3;
    return hash ^ (hash >> 32);
}

}  // namespace duetto
