// What tests of attention's kernels share: requests with their inputs and an arena, steps over them,
// and keys and values as the cache keeps them, in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/attention.h"
#include "tests/check.h"

namespace {

namespace isa = duetto::DUETTO_ISA;
using duetto::AttentionArgs;
using duetto::AttentionItem;
using duetto::KvFormat;
using duetto::KvLayer;
using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

struct Case {
    KvFormat format;
    int32_t heads, kv_heads, head_dim, block_size, window;
    float softcap;
    Ints lengths;  // of the prompts, one request each
};

// Everything of a case's requests: their inputs, an arena full of NaN, a shuffled block table.
struct World {
    explicit World(const Case& c) : shape(c), random(17) {
        std::normal_distribution<float> normal(0, 1);
        for (int32_t length : c.lengths) {
            starts.push_back(total);
            total += length;
            max_blocks = std::max(max_blocks, (length + c.block_size - 1) / c.block_size);
        }
        for (Floats* x : {&q, &k, &v}) {
            x->resize((size_t)total * (x == &q ? c.heads : c.kv_heads) * c.head_dim);
            for (float& number : *x) number = normal(random);
        }
        for (float& number : q) number *= 2;  // attention with a few large weights
        const int64_t num_blocks = (int64_t)c.lengths.size() * max_blocks + 1;
        const int64_t block_bytes =
            isa::kv_block_bytes(c.format, c.block_size, c.kv_heads, c.head_dim);
        CHECK(block_bytes % 64 == 0);
        arena.resize((size_t)(num_blocks * block_bytes) + 64);
        uint8_t* data = (uint8_t*)(((uintptr_t)arena.data() + 63) / 64 * 64);
        kv = {data, c.format, c.block_size, c.kv_heads, c.head_dim, block_bytes};
        Ints blocks((size_t)num_blocks);
        std::iota(blocks.begin(), blocks.end(), 0);
        // block 0 is what tables are padded with
        std::shuffle(blocks.begin() + 1, blocks.end(), random);
        tables.assign(c.lengths.size() * (size_t)max_blocks, 0);
        size_t next = 1;
        for (size_t r = 0; r < c.lengths.size(); ++r)
            for (int32_t b = 0; b * c.block_size < c.lengths[r]; ++b)
                tables[r * max_blocks + b] = blocks[next++];
    }

    void forget() { std::fill(arena.begin(), arena.end(), 0xff); }  // NaN in every float format

    Case shape;
    std::mt19937 random;
    int32_t total = 0, max_blocks = 1;
    Ints starts, tables;  // starts: of each request's rows in q, k, v
    Floats q, k, v;
    std::vector<uint8_t> arena;
    KvLayer kv;
};

// Some requests' next tokens: (request, first position, number)
struct Chunk {
    int32_t request, first, count;
};

// A step's arrays, and its queries, keys and values side by side
struct Laid {
    Ints positions, slots, query_starts = {0}, context_lens, tables, rows;
    Floats qkv;
    int64_t ldq = 0, num_requests = 0, max_blocks = 0;

    duetto::StepView view() const {
        return {(int64_t)rows.size(), num_requests,        max_blocks,          positions.data(),
                slots.data(),         query_starts.data(), context_lens.data(), tables.data()};
    }
    AttentionArgs args(const World& world, float* out, int64_t ldo) const {
        const Case& c = world.shape;
        const float scale = 1 / std::sqrt((float)c.head_dim);
        return {qkv.data(), ldq, out, ldo, world.kv, c.heads, scale, c.window, c.softcap};
    }
};

Laid lay_out(const World& world, const std::vector<Chunk>& chunks) {
    const Case& c = world.shape;
    const int64_t q_width = (int64_t)c.heads * c.head_dim,
                  kv_width = (int64_t)c.kv_heads * c.head_dim;
    Laid laid;
    laid.ldq = q_width + 2 * kv_width + 1;
    laid.num_requests = (int64_t)chunks.size();
    laid.max_blocks = world.max_blocks;
    for (const Chunk& chunk : chunks) {
        const int32_t* table = world.tables.data() + (size_t)chunk.request * world.max_blocks;
        for (int32_t p = chunk.first; p < chunk.first + chunk.count; ++p) {
            laid.positions.push_back(p);
            laid.slots.push_back(table[p / c.block_size] * c.block_size + p % c.block_size);
            laid.rows.push_back(world.starts[chunk.request] + p);
        }
        laid.query_starts.push_back((int32_t)laid.rows.size());
        laid.context_lens.push_back(chunk.first + chunk.count);
        laid.tables.insert(laid.tables.end(), table, table + world.max_blocks);
    }
    laid.qkv.assign(laid.rows.size() * (size_t)laid.ldq, NAN);
    for (size_t i = 0; i < laid.rows.size(); ++i) {
        float* to = laid.qkv.data() + i * laid.ldq;
        std::copy_n(&world.q[laid.rows[i] * q_width], q_width, to);
        std::copy_n(&world.k[laid.rows[i] * kv_width], kv_width, to + q_width);
        std::copy_n(&world.v[laid.rows[i] * kv_width], kv_width, to + q_width + kv_width);
    }
    return laid;
}

// Memory that a kernel works in, full of NaN
struct Scratch {
    explicit Scratch(const AttentionArgs& args) {
        const size_t bytes = isa::attention_scratch_bytes(&args);
        data = (uint8_t*)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        std::memset(data, 0xff, bytes);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data); }
    uint8_t* data;
};

// One step; what it computes goes to the same rows of `out` as the tokens have in the world.
void run_step(World& world, const std::vector<Chunk>& chunks, int32_t threads, Floats& out) {
    const Case& c = world.shape;
    const int64_t q_width = (int64_t)c.heads * c.head_dim,
                  kv_width = (int64_t)c.kv_heads * c.head_dim, ldo = q_width + 3;
    const Laid laid = lay_out(world, chunks);
    const int64_t num_rows = (int64_t)laid.rows.size(), half = num_rows / 2;
    Floats result((size_t)(num_rows * ldo), 77.0f);
    const float *k = laid.qkv.data() + q_width, *v = k + kv_width;
    isa::write_kv(&world.kv, laid.slots.data(), k, v, laid.ldq, half, num_rows);
    isa::write_kv(&world.kv, laid.slots.data(), k, v, laid.ldq, 0, half);

    const duetto::StepView step = laid.view();
    const AttentionArgs args = laid.args(world, result.data(), ldo);
    std::vector<AttentionItem> items((size_t)duetto::plan_attention(step, args, threads, nullptr));
    CHECK(duetto::plan_attention(step, args, threads, items.data()) == (int64_t)items.size());
    Floats partials((size_t)(isa::attention_partial_floats(&args) *
                             duetto::num_partial_places(items.data(), (int64_t)items.size())),
                    NAN);
    const Scratch scratch(args);
    Ints order(items.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), world.random);
    for (int32_t i : order)
        isa::attention(&args, &step, &items[(size_t)i], partials.data(), scratch.data);
    for (size_t i = 0, next; i < items.size(); i = next) {
        for (next = i + 1; next < items.size() && items[i].partial >= 0 &&
                           items[next].split_begin > items[i].split_begin &&
                           items[next].request == items[i].request &&
                           items[next].kv_head == items[i].kv_head &&
                           items[next].row_begin == items[i].row_begin;)
            ++next;
        if (items[i].partial >= 0)
            isa::attention_merge(&args, &step, &items[i], (int32_t)(next - i), partials.data());
    }
    for (int64_t i = 0; i < num_rows; ++i) {
        std::copy_n(result.data() + i * ldo, q_width, &out[laid.rows[(size_t)i] * q_width]);
        CHECK(result[i * ldo + q_width] == 77.0f, "attention writes beyond its columns");
    }
}

// -- the twin in double precision -----------------------------------------------------------------

double rounded_to(KvFormat format, float x, float largest) {
    if (format == KvFormat::f16) {  // to 11 significant bits, or a multiple of 2^-24
        int exponent;
        std::frexp(x, &exponent);
        const int step = std::max(exponent - 11, -24);
        return std::ldexp(std::nearbyint(std::ldexp((double)x, -step)), step);
    }
    if (format == KvFormat::bf16) {  // to 8
        int exponent;
        std::frexp(x, &exponent);
        return std::ldexp(std::nearbyint(std::ldexp((double)x, 8 - exponent)), exponent - 8);
    }
    if (format == KvFormat::int8)
        return (double)std::nearbyint(x / (largest / 127)) * (largest / 127);
    return x;
}

// One token's key or value of one head as the cache keeps it
std::vector<double> kept(KvFormat format, const float* row, int32_t head_dim) {
    float largest = 0;
    for (int32_t d = 0; d < head_dim; ++d) largest = std::max(largest, std::fabs(row[d]));
    std::vector<double> values;
    for (int32_t d = 0; d < head_dim; ++d) values.push_back(rounded_to(format, row[d], largest));
    return values;
}

}  // namespace
