// kernels/look.h: sums of weights against plain double precision, and the promise that they are the
// same whoever shares the work, in whatever parts. Compiled once per instruction set (DUETTO_ISA).
#include "kernels/look.h"

#include "tests/attention_world.h"

namespace {

using duetto::LookItem;
using Sums = std::vector<int64_t>;  // of positions begin ... end, then the lost ones

// What positions begin ... end get of a request's tokens first ... first + count, whose keys are in
// the cache: in parts of so many queries, in any order.
Sums look(World& world, const Chunk& chunk, int32_t begin, int32_t end, int32_t rows_per_item) {
    const Laid laid = lay_out(world, {{0, 0, 1}, chunk});  // beside a token of another's
    const duetto::StepView step = laid.view();
    const AttentionArgs args = laid.args(world, nullptr, 0);
    std::vector<LookItem> items;
    for (int32_t head = 0; head < world.shape.kv_heads; ++head)
        for (int32_t row = 1; row < 1 + chunk.count; row += rows_per_item)
            items.push_back(
                {1, head, row, std::min(row + rows_per_item, 1 + chunk.count), begin, end});
    std::shuffle(items.begin(), items.end(), world.random);
    const Scratch scratch(args);
    Sums sums((size_t)(end - begin) + 1, 0);
    for (const LookItem& item : items) isa::look(&args, &step, &item, sums.data(), scratch.data);
    return sums;
}

// The same in double precision
Sums twin(const World& world, const Chunk& chunk, int32_t begin, int32_t end) {
    const Case& c = world.shape;
    Sums sums((size_t)(end - begin) + 1, 0);
    const size_t start = (size_t)world.starts[chunk.request];
    for (int32_t h = 0; h < c.heads; ++h) {
        const int32_t kv_head = h / (c.heads / c.kv_heads);
        std::vector<std::vector<double>> keys;
        for (int32_t p = 0; p < chunk.first + chunk.count; ++p)
            keys.push_back(kept(
                c.format, &world.k[((start + p) * c.kv_heads + kv_head) * c.head_dim], c.head_dim));
        for (int32_t position = chunk.first; position < chunk.first + chunk.count; ++position) {
            const float* q = &world.q[((start + position) * c.heads + h) * c.head_dim];
            const int32_t first = c.window ? std::max(0, position + 1 - c.window) : 0;
            std::vector<double> weights;
            for (int32_t p = first; p <= position; ++p) {
                double score = std::inner_product(keys[p].begin(), keys[p].end(), q, 0.0);
                score /= std::sqrt((double)c.head_dim);
                if (c.softcap > 0) score = std::tanh(score / c.softcap) * c.softcap;
                weights.push_back(std::exp(score));
            }
            const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
            for (int32_t p = std::max(first, begin); p <= std::min(position, end - 1); ++p)
                sums[p - begin] += std::llround(std::ldexp(weights[p - first] / total, 20));
        }
    }
    return sums;
}

void check_case(const Case& c, int32_t last_tokens) {
    World world(c);
    Floats out((size_t)world.total * c.heads * c.head_dim, NAN);
    world.forget();
    const auto last = (int32_t)c.lengths.size() - 1;
    for (int32_t r = 0; r <= last; ++r) run_step(world, {{r, 0, c.lengths[r]}}, 1, out);
    const int32_t length = c.lengths[last];
    const Chunk chunk = {last, length - last_tokens, last_tokens};
    for (const auto& [begin, end] : {std::pair(0, length), std::pair(length / 3, length / 2),
                                     std::pair(length - 1, length + 70), std::pair(5, 5)}) {
        const Sums expected = twin(world, chunk, begin, end),
                   sums = look(world, chunk, begin, end, 1);
        // scores reach 10, where fp32 has steps of 1e-6, and so have weights, relatively: 10 units of
        // a weight of 1
        for (size_t i = 0; i < sums.size(); ++i)
            CHECK(std::abs((double)(sums[i] - expected[i])) <=
                      c.heads * last_tokens + 2e-5 * (double)expected[i],
                  "format %d, heads of %d, window %d, position %d: %ld, not %ld", (int)c.format,
                  c.head_dim, c.window, begin + (int32_t)i, (long)sums[i], (long)expected[i]);
        for (int32_t rows : {3, 16, 400})
            CHECK(look(world, chunk, begin, end, rows) == sums, "parts of %d rows", rows);
    }
    Sums halves = look(world, {last, chunk.first, last_tokens / 2}, 0, length, 16);
    const int32_t half = chunk.first + last_tokens / 2;
    const Sums rest = look(world, {last, half, length - half}, 0, length, 16);
    for (size_t i = 0; i < halves.size(); ++i) halves[i] += rest[i];
    CHECK(halves == look(world, chunk, 0, length, 16), "two chunks");
}

void test_cases() {
    for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8}) {
        check_case({format, 4, 2, 64, 16, 0, 0, {19, 130}}, 20);
        check_case({format, 3, 1, 80, 32, 0, 0, {1, 99}}, 33);
        check_case({format, 2, 1, 20, 5, 0, 0, {70}}, 7);
        check_case({format, 4, 2, 64, 16, 40, 0, {150}}, 60);  // windows
        check_case({format, 4, 2, 32, 16, 0, 5, {90}}, 9);  // soft-capping
        check_case({format, 4, 4, 32, 48, 0, 0, {kSlow ? 530 : 1100}}, 5);
        check_case({format, 100, 1, 16, 16, 0, 0, {19}}, 5);  // a group beyond kChunkRows
    }
}

// Tokens whose weights are no numbers are counted, and change no sum.
void test_not_finite() {
    for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8})
        for (float bad : {INFINITY, std::nanf("")}) {
            World world({format, 2, 1, 64, 16, 0, 0, {40}});
            Floats out((size_t)40 * 128, 0);
            world.k[30 * 64 + 5] = bad;
            world.forget();
            run_step(world, {{0, 0, 40}}, 1, out);
            const Sums before = look(world, {0, 20, 10}, 0, 40, 4),
                       all = look(world, {0, 20, 20}, 0, 40, 4);
            CHECK(before[40] == 0 && all[40] > 0, "%ld lost", (long)all[40]);
            CHECK(all[40] == 20 || bad == INFINITY, "%ld lost", (long)all[40]);
            if (all[40] == 20) CHECK(std::equal(before.begin(), before.end() - 1, all.begin()));
        }
}

}  // namespace

int main() {
    test_cases();
    test_not_finite();
    return report("test_look");
}
