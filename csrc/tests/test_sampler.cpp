// The sampler's passes against plain loops, per instruction set (DUETTO_ISA): the pruned draw is the
// largest of all scores, and the argmax tells what is not finite.
#include "sampler.h"

#include <cmath>
#include <random>
#include <vector>

#include "kernels/sampling.h"
#include "tests/check.h"

namespace {

namespace isa = duetto::DUETTO_ISA;
using Floats = std::vector<float>;

duetto::Kernels kernels() {
    duetto::Kernels table = {};
    table.finite_argmax = isa::finite_argmax;
    table.first_to_score = isa::first_to_score;
    return table;
}

int64_t plain_draw(const Floats& row, float largest, double temperature, uint64_t key) {
    int64_t best = 0;
    double score = -INFINITY;
    for (size_t i = 0; i < row.size(); ++i) {
        const double scaled = ((double)row[i] - (double)largest) / temperature;
        const double own = scaled + duetto::gumbel_noise(key, (uint32_t)i);
        if (own > score) best = (int64_t)i, score = own;
    }
    return best;
}

void test_draw(int64_t size, float spread, unsigned seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, 1);
    Floats row(size);
    for (float& v : row) v = random() % 5 == 0 ? -INFINITY : normal(random) * spread;
    row[random() % row.size()] = 2 * spread;
    const int64_t best = isa::finite_argmax(row.data(), size);
    CHECK(best >= 0 && row[best] >= 2 * spread, "size %ld", (long)size);
    for (double temperature : {5e-324, 1e-5, 0.7, 1.0, 100.0, 1e35}) {
        const uint64_t key = random();
        std::vector<double> scaled(size);
        for (int64_t i = 0; i < size; ++i)
            scaled[i] = ((double)row[i] - (double)row[best]) / temperature;
        const int64_t want = plain_draw(row, row[best], temperature, key);
        const int64_t got = duetto::draw_row(kernels(), row.data(), size, best, temperature, key);
        CHECK(got == want, "size %ld, spread %g, temperature %g", (long)size, spread, temperature);
        CHECK(duetto::draw_scaled(scaled.data(), nullptr, size, key) == want, "scaled");
    }
}

void test_argmax() {
    for (int64_t size : {1, 5, 16, 33, 1024, 1025, 3000})
        for (int64_t at : {(int64_t)0, size / 2, size - 1}) {
            Floats row(size, -1);
            row[at] = row[size - 1] = 3;
            CHECK(isa::finite_argmax(row.data(), size) == at, "size %ld", (long)size);
            for (float bad : {INFINITY, std::nanf(""), -std::nanf("")}) {
                row[at] = bad;
                CHECK(isa::finite_argmax(row.data(), size) == -1, "%g of %ld", bad, (long)size);
            }
        }
    const Floats none(40, -INFINITY);
    CHECK(isa::finite_argmax(none.data(), 40) == -1, "nothing but -inf");
}

}  // namespace

int main() {
    test_argmax();
    for (int64_t size : {1, 2, 15, 16, 17, 100, 1025, 9000})
        for (float spread : {0.0f, 0.01f, 1.0f, 5.0f, 1e30f})
            for (unsigned seed = 0; seed < (kSlow ? 5u : 50u); ++seed)
                test_draw(size, spread, seed);
    return report("test_sampler");
}
