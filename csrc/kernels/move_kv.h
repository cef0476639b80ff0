// A token's KV copied from one slot to another, its key turned by a rotation on the way: what reuse of
// a text at another position needs. Values and their scales are copied as they are. And KV as fp32.
#pragma once

#include "kernels/kv.h"
#include "kernels/rows.h"

namespace duetto {
namespace DUETTO_ISA {

template <typename Format>
static void move_rows(const KvLayer& kv, const int32_t* from, const int32_t* to, int64_t half,
                      const float* cos, const float* sin, int64_t begin, int64_t end, float* row) {
    typedef typename Format::Element Element;
    const HeadLayout layout = head_layout(kv.format, kv.block_size, kv.head_dim);
    const int64_t size = kv.block_size, dim = kv.head_dim;
    for (int64_t i = begin; i < end; ++i)
        for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
            const int64_t from_slot = from[i] % size, to_slot = to[i] % size;
            uint8_t* head_of_block = kv.data + head * layout.bytes;
            const uint8_t* source = head_of_block + from[i] / size * kv.block_bytes;
            uint8_t* target = head_of_block + to[i] / size * kv.block_bytes;
            const auto* source_scales = (const float*)(source + layout.scales);
            auto* target_scales = (float*)(target + layout.scales);

            std::memcpy((Element*)(target + layout.values) + to_slot * dim,
                        (const Element*)(source + layout.values) + from_slot * dim,
                        (size_t)dim * sizeof(Element));
            if (Format::kQuantized) target_scales[size + to_slot] = source_scales[size + from_slot];

            const Element* key = (const Element*)source + from_slot;
            Element* moved = (Element*)target + to_slot;
            float scale = Format::kQuantized ? source_scales[from_slot] : 1;
            if (half == 0) {
                for (int64_t d = 0; d < dim; ++d) moved[d * size] = key[d * size];
            } else {
                for (int64_t d = 0; d < dim; ++d) row[d] = Format::widen_one(key[d * size]) * scale;
                rope(row, dim, 1, 1, dim, 2 * half, cos + i * half, sin + i * half);
                scale = write_row<Format>(row, dim, moved, size);
            }
            if (Format::kQuantized) target_scales[to_slot] = scale;
        }
}

static void move_kv(const KvLayer* kv, const int32_t* from, const int32_t* to, int64_t half,
                    const float* cos, const float* sin, int64_t begin, int64_t end, float* row) {
    switch (kv->format) {
        case KvFormat::f32:
            return move_rows<KvF32>(*kv, from, to, half, cos, sin, begin, end, row);
        case KvFormat::f16:
            return move_rows<KvF16>(*kv, from, to, half, cos, sin, begin, end, row);
        case KvFormat::bf16:
            return move_rows<KvBf16>(*kv, from, to, half, cos, sin, begin, end, row);
        case KvFormat::int8:
            return move_rows<KvInt8>(*kv, from, to, half, cos, sin, begin, end, row);
    }
}

template <typename Format>
static void read_rows(const KvLayer& kv, const int32_t* slots, int64_t begin, int64_t end,
                      float* keys, float* values) {
    typedef typename Format::Element Element;
    const HeadLayout layout = head_layout(kv.format, kv.block_size, kv.head_dim);
    const int64_t size = kv.block_size, dim = kv.head_dim;
    for (int64_t i = begin; i < end; ++i)
        for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
            const int64_t slot = slots[i] % size, column = (i * kv.num_kv_heads + head) * dim;
            const uint8_t* source =
                kv.data + slots[i] / size * kv.block_bytes + head * layout.bytes;
            const Element* key = (const Element*)source + slot;
            const Element* value = (const Element*)(source + layout.values) + slot * dim;
            const auto* scales = (const float*)(source + layout.scales) + slot;
            for (int64_t d = 0; d < dim; ++d) {
                keys[column + d] = Format::widen_one(key[d * size]);
                values[column + d] = Format::widen_one(value[d]);
                if (!Format::kQuantized) continue;
                keys[column + d] *= scales[0];
                values[column + d] *= scales[size];
            }
        }
}

static void read_kv(const KvLayer* kv, const int32_t* slots, int64_t begin, int64_t end,
                    float* keys, float* values) {
    switch (kv->format) {
        case KvFormat::f32:
            return read_rows<KvF32>(*kv, slots, begin, end, keys, values);
        case KvFormat::f16:
            return read_rows<KvF16>(*kv, slots, begin, end, keys, values);
        case KvFormat::bf16:
            return read_rows<KvBf16>(*kv, slots, begin, end, keys, values);
        case KvFormat::int8:
            return read_rows<KvInt8>(*kv, slots, begin, end, keys, values);
    }
}

}  // namespace DUETTO_ISA
}  // namespace duetto
