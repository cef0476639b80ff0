// kernels/attention.h and attention_plan.cpp: against plain double precision, and the promise that
// a row has the same bits whether its prompt is computed whole, token by token or in any chunks, in
// whatever company, on however many threads. Compiled once per instruction set (DUETTO_ISA).
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

// One step; what it computes goes to the same rows of `out` as the tokens have in the world.
void run_step(World& world, const std::vector<Chunk>& chunks, int32_t threads, Floats& out) {
    const Case& c = world.shape;
    const int64_t q_width = (int64_t)c.heads * c.head_dim,
                  kv_width = (int64_t)c.kv_heads * c.head_dim;
    const int64_t ldq = q_width + 2 * kv_width + 1, ldo = q_width + 3;
    Ints positions, slots, query_starts = {0}, context_lens, tables, rows;
    for (const Chunk& chunk : chunks) {
        const int32_t* table = world.tables.data() + (size_t)chunk.request * world.max_blocks;
        for (int32_t p = chunk.first; p < chunk.first + chunk.count; ++p) {
            positions.push_back(p);
            slots.push_back(table[p / c.block_size] * c.block_size + p % c.block_size);
            rows.push_back(world.starts[chunk.request] + p);
        }
        query_starts.push_back((int32_t)rows.size());
        context_lens.push_back(chunk.first + chunk.count);
        tables.insert(tables.end(), table, table + world.max_blocks);
    }
    Floats qkv(rows.size() * (size_t)ldq, NAN), result(rows.size() * (size_t)ldo, 77.0f);
    for (size_t i = 0; i < rows.size(); ++i) {
        float* to = qkv.data() + i * ldq;
        std::copy_n(&world.q[rows[i] * q_width], q_width, to);
        std::copy_n(&world.k[rows[i] * kv_width], kv_width, to + q_width);
        std::copy_n(&world.v[rows[i] * kv_width], kv_width, to + q_width + kv_width);
    }
    const int64_t num_rows = (int64_t)rows.size(), half = num_rows / 2;
    isa::write_kv(&world.kv, slots.data(), qkv.data() + q_width, qkv.data() + q_width + kv_width,
                  ldq, half, num_rows);
    isa::write_kv(&world.kv, slots.data(), qkv.data() + q_width, qkv.data() + q_width + kv_width,
                  ldq, 0, half);

    const duetto::StepView step = {
        num_rows,     (int64_t)chunks.size(), world.max_blocks,    positions.data(),
        slots.data(), query_starts.data(),    context_lens.data(), tables.data()};
    const AttentionArgs args = {qkv.data(),
                                ldq,
                                result.data(),
                                ldo,
                                world.kv,
                                c.heads,
                                1 / std::sqrt((float)c.head_dim),
                                c.window,
                                c.softcap};
    std::vector<AttentionItem> items((size_t)duetto::plan_attention(step, args, threads, nullptr));
    CHECK(duetto::plan_attention(step, args, threads, items.data()) == (int64_t)items.size());
    Floats partials((size_t)(isa::attention_partial_floats(&args) *
                             duetto::num_partial_places(items.data(), (int64_t)items.size())),
                    NAN);
    void* scratch = std::aligned_alloc(64, (isa::attention_scratch_bytes(&args) + 63) / 64 * 64);
    std::memset(scratch, 0xff, isa::attention_scratch_bytes(&args));
    Ints order(items.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), world.random);
    for (int32_t i : order)
        isa::attention(&args, &step, &items[(size_t)i], partials.data(), (uint8_t*)scratch);
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
    std::free(scratch);
    for (size_t i = 0; i < rows.size(); ++i) {
        std::copy_n(result.data() + i * ldo, q_width, &out[rows[i] * q_width]);
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

void check_row(const World& world, int32_t request, int32_t position, const Floats& out) {
    const Case& c = world.shape;
    const int32_t first = c.window ? std::max(0, position + 1 - c.window) : 0,
                  group = c.heads / c.kv_heads;
    for (int32_t h = 0; h < c.heads; ++h) {
        auto row_of = [&](const Floats& x, int32_t p, int32_t heads, int32_t head) {
            return &x[((size_t)(world.starts[request] + p) * heads + head) * c.head_dim];
        };
        const float* q = row_of(world.q, position, c.heads, h);
        std::vector<double> sums((size_t)c.head_dim, 0);
        double total = 0;
        for (int32_t p = first; p <= position; ++p) {
            const std::vector<double> k =
                kept(c.format, row_of(world.k, p, c.kv_heads, h / group), c.head_dim);
            const std::vector<double> v =
                kept(c.format, row_of(world.v, p, c.kv_heads, h / group), c.head_dim);
            double score = 0;
            for (int32_t d = 0; d < c.head_dim; ++d) score += q[d] * k[d];
            score /= std::sqrt((double)c.head_dim);
            if (c.softcap > 0) score = std::tanh(score / c.softcap) * c.softcap;
            const double weight = std::exp(score);
            total += weight;
            for (int32_t d = 0; d < c.head_dim; ++d) sums[d] += weight * v[d];
        }
        const float* got = row_of(out, position, c.heads, h);
        // scores reach 10, where fp32 has steps of 1e-6, and so have weights, relatively
        for (int32_t d = 0; d < c.head_dim; ++d)
            CHECK(
                std::fabs(got[d] - sums[d] / total) <= 1e-5,
                "format %d, %d/%d heads of %d, blocks of %d, window %d, request %d, position %d, head %d, column %d: "
                "%.9g, not %.9g",
                (int)c.format, c.heads, c.kv_heads, c.head_dim, c.block_size, c.window, request,
                position, h, d, got[d], sums[d] / total);
    }
}

// -- one case -------------------------------------------------------------------------------------

void check_same(const World& world, const char* what, const Floats& got, const Floats& want) {
    const Case& c = world.shape;
    const size_t width = (size_t)c.heads * c.head_dim;
    for (int32_t row = 0; row < world.total; ++row)
        CHECK(std::memcmp(&got[row * width], &want[row * width], width * 4) == 0,
              "%s: row %d differs (format %d, head_dim %d, blocks of %d, window %d)", what, row,
              (int)c.format, c.head_dim, c.block_size, c.window);
}

void compute_whole(World& world, int32_t threads, Floats& out) {
    std::vector<Chunk> chunks;
    for (size_t r = 0; r < world.shape.lengths.size(); ++r)
        chunks.push_back({(int32_t)r, 0, world.shape.lengths[r]});
    world.forget();
    run_step(world, chunks, threads, out);
}

// Steps of random requests' next tokens, at most `most` of each
void compute_in_chunks(World& world, int32_t most, Floats& out) {
    const Ints& lengths = world.shape.lengths;
    Ints done(lengths.size(), 0);
    const int32_t threads[] = {1, 2, 3, 16};
    world.forget();
    for (int32_t left = world.total; left > 0;) {
        std::vector<Chunk> chunks;
        for (size_t r = 0; r < lengths.size(); ++r) {
            if (done[r] == lengths[r] || world.random() % 4 == 0) continue;
            const int32_t count = std::min<int32_t>(lengths[r] - done[r],
                                                    1 + (int32_t)(world.random() % (unsigned)most));
            chunks.push_back({(int32_t)r, done[r], count});
            done[r] += count;
            left -= count;
        }
        std::shuffle(chunks.begin(), chunks.end(), world.random);
        run_step(world, chunks, threads[world.random() % 4], out);  // also with no request at all
    }
}

void check_case(const Case& c) {
    World world(c);
    const Floats empty((size_t)world.total * c.heads * c.head_dim, NAN);
    Floats whole = empty, other = empty;
    compute_whole(world, 1, whole);
    for (size_t r = 0; r < c.lengths.size(); ++r)
        for (int32_t p = 0; p < c.lengths[r]; p += p % 64 == 63 || p % 64 == 0 ? 1 : 21)
            check_row(world, (int32_t)r, std::min(p, c.lengths[r] - 1), whole);
    compute_whole(world, 16, other);
    check_same(world, "16 threads", other, whole);
    for (int32_t most : {1, 7, 150}) {
        if (kSlow && most == 1 && world.total > 500) continue;
        other = empty;
        compute_in_chunks(world, most, other);
        check_same(world, most == 1 ? "token by token" : "chunks", other, whole);
    }
}

void test_cases() {
    const Ints lengths = {1, 19, 99, 111};
    for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8}) {
        for (int32_t block_size : {1, 16, 32, 48})
            check_case({format, 4, 2, 64, block_size, 0, 0, lengths});
        for (int32_t head_dim : {16, 80, 96, 100, 128, 256})
            check_case({format, 3, 1, head_dim, 16, 0, 0, lengths});
        // over splits, one head a group
        const int32_t most = kSlow ? 1030 : 1100;
        check_case({format, 2, 2, 32, 32, 0, 0, {kSlow ? 50 : 500, most, 19}});
        check_case({format, 8, 1, 16, 16, 0, 0, {kSlow ? 9 : 600, 1, 513}});  // one KV head
        check_case({format, 4, 2, 64, 16, 40, 0, {111, 1, 600}});  // windows
        check_case({format, 2, 1, 20, 5, 1, 0, {99, 19}});
        check_case({format, 2, 1, 64, 16, 700, 0, {kSlow ? 1240 : 1300}});
        check_case({format, 4, 2, 64, 32, 0, 5, lengths});  // soft-capping
        // a group beyond kChunkRows
        check_case({format, 100, 1, 16, 16, 0, 0, {19}});
    }
}

// Several numbers at once, at the beginning and the end of a piece: as one by one
void check_f16_narrow(float x) {
    const float row[11] = {x, x * 1.0003f, 1e-9f, 1e9f, NAN, 2, -3, 4, x, x * 0.9997f, -x};
    uint16_t got[11];
    isa::KvF16::narrow(row, 11, 1, got);
    for (int i = 0; i < 11; ++i)
        CHECK(got[i] == isa::f32_to_f16(row[i]), "%g: %x, not %x", row[i], got[i],
              isa::f32_to_f16(row[i]));
}

void test_f16() {
    for (uint32_t h = 0; h < 0x10000; ++h) {
        const uint16_t half = (uint16_t)h;
        uint16_t row[isa::kLanes] = {half};
        const float plain = isa::f16_bits_to_f32(isa::vu{} + h)[0],
                    fast = isa::KvF16::widen(row)[0];
        if ((h & 0x7fff) > 0x7c00) {
            CHECK(
                std::isnan(plain) && std::isnan(fast) && (isa::f32_to_f16(plain) & 0x7fff) > 0x7c00,
                "NaN %x", h);
            continue;
        }
        CHECK(plain == fast && std::signbit(plain) == std::signbit(fast), "%x: %g, %g", h, plain,
              fast);
        CHECK(isa::f32_to_f16(plain) == half, "%x does not come back", h);
        if (h % 97 == 0) check_f16_narrow(plain);
        if (h >= 0x7bff) continue;  // halfway to the next number: the even one
        const float next = isa::f16_bits_to_f32(isa::vu{} + (h + 1))[0],
                    middle = (plain + next) / 2;
        CHECK(isa::f32_to_f16(middle) == h + (h & 1), "halfway above %x", h);
        CHECK(isa::f32_to_f16(std::nextafter(middle, 0.0f)) == h, "below halfway above %x", h);
        CHECK(isa::f32_to_f16(std::nextafter(middle, INFINITY)) == h + 1, "above halfway above %x",
              h);
    }
    CHECK(isa::f32_to_f16(65519) == 0x7bff && isa::f32_to_f16(65520) == 0x7c00 &&
          isa::f32_to_f16(1e30f) == 0x7c00);
}

// A key or value that is not finite must be found in what attention makes of it; zeros are kept as
// zeros.
void test_not_finite() {
    for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8})
        for (float bad : {INFINITY, std::nanf("")}) {
            const Case c = {format, 2, 1, 64, 16, 0, 0, {40}};
            for (bool key : {true, false}) {
                World world(c);
                (key ? world.k : world.v)[10 * 64 + 5] = bad;
                Floats out((size_t)40 * 128, 0);
                compute_whole(world, 1, out);
                bool found = false;
                for (int i = 0; i < 128; ++i) found = found || !std::isfinite(out[39 * 128 + i]);
                CHECK(found, "%g in format %d is lost", bad, (int)format);
                for (int i = 0; key && i < 10 * 128; ++i)
                    CHECK(std::isfinite(out[i]), "rows before are spoilt too");
            }
        }
    for (KvFormat format : {KvFormat::f32, KvFormat::int8}) {
        World world({format, 2, 1, 64, 16, 0, 0, {40}});
        std::fill(world.v.begin(), world.v.end(), 0.0f);
        Floats out((size_t)40 * 128, NAN);
        compute_whole(world, 1, out);
        for (float x : out) CHECK(x == 0, "values of zeros");
    }
}

void test_plan() {
    // one decoding request with a long context is cut at its splits; 16 threads get something each
    const Ints positions = {5000}, slots = {0}, query_starts = {0, 1}, context_lens = {5001},
               tables(400, 0);
    const duetto::StepView step = {1,
                                   1,
                                   400,
                                   positions.data(),
                                   slots.data(),
                                   query_starts.data(),
                                   context_lens.data(),
                                   tables.data()};
    AttentionArgs args = {};
    args.kv = {nullptr, KvFormat::bf16, 16, 2, 64, 0};
    args.num_heads = 8;
    std::vector<AttentionItem> items((size_t)duetto::plan_attention(step, args, 16, nullptr));
    duetto::plan_attention(step, args, 16, items.data());
    CHECK(items.size() == 20, "%zu items", items.size());
    CHECK(duetto::num_partial_places(items.data(), (int64_t)items.size()) == 20);
    CHECK(duetto::plan_attention(step, args, 1, nullptr) == 2);
    args.window = 100;  // one split is enough
    CHECK(duetto::plan_attention(step, args, 16, nullptr) == 2);
}

}  // namespace

int main() {
    test_f16();
    test_cases();
    test_not_finite();
    test_plan();
    return report("test_attention");
}
