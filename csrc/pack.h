// Weights into the tiles of kernels.h, quantized on the way if the format says so. Knows no
// instruction set: the same numbers give the same bytes on every machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace duetto {

enum class SourceType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// Some rows of a weight as a checkpoint holds them. A weight that is several tensors on top of each
// other (query, key, value) is several of these.
struct SourceRows {
    const void* data;
    SourceType type;
    int64_t rows;
    int64_t ld;  // numbers from one row to the next
};

struct PackedBytes {
    size_t data, scales;
};

// Scales are per output (group 0) or per `group` of k, a multiple of 8.
PackedBytes packed_bytes(WeightFormat format, int64_t n, int64_t k, int32_t group);

// Packs the tiles tile_begin ... tile_end of a weight whose format, group, n, k and k_padded `shape`
// gives, into `data` and `scales`, which are the whole weight's. Returns -1, or the first of these
// tiles' rows that holds a NaN or an infinity (or becomes one in bf16), where it stopped; or kNotCoded
// if bf12 has no room for a tile's exceptions.
//
// int8: scale = max |w| / 127, rounded up to bf16, so that nothing is clipped.
// int4: the scale, of a few near max |w| / 8, with the least squared error, refined once by least squares.
inline constexpr int64_t kNotCoded = -2;

int64_t pack_tiles(const PackedWeight& shape, const SourceRows* sources, int64_t num_sources,
                   int64_t tile_begin, int64_t tile_end, uint8_t* data, uint16_t* scales);

// Whether a bf12 weight's exceptions lie in their tiles, in order: what kernels take for granted.
bool is_whole(const PackedWeight& coded);

}  // namespace duetto
