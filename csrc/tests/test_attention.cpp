// kernels/attention.h and attention_plan.cpp: against plain double precision, and the promise that
// a row has the same bits whether its prompt is computed whole, token by token or in any chunks, in
// whatever company, on however many threads. Compiled once per instruction set (DUETTO_ISA).
#include "tests/attention_world.h"

namespace {

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
