// The sampler's passes against plain loops, per instruction set (DUETTO_ISA): the pruned draw is the
// largest of all scores, the argmax tells what is not finite, and what the filters leave is what a sort
// leaves.
#include "sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/sampling.h"
#include "tests/check.h"
#include "weight.h"

namespace {

namespace isa = duetto::DUETTO_ISA;
using Floats = std::vector<float>;

duetto::Kernels kernels() {
    duetto::Kernels table = {};
    table.finite_argmax = isa::finite_argmax;
    table.first_to_score = isa::first_to_score;
    table.weigh = isa::weigh;
    table.block_maxima = isa::block_maxima;
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

uint64_t plain_weight(double gap) {
    const double x = std::max(gap, duetto::kLeastGap);
    DUETTO_WEIGHT(double, uint64_t, x)
    return weight;
}

// By a sort: which tokens are left, then the one with the largest score.
int64_t plain_filtered(std::vector<duetto::Ranked> tokens, const duetto::Filters& filters,
                       uint64_t key) {
    std::sort(tokens.begin(), tokens.end(),
              [](const auto& a, const auto& b) { return a.is_ahead_of(b); });
    const double first = tokens[0].logit;
    const double inverse = std::min(1.0 / filters.temperature, DBL_MAX);
    if (filters.top_k > 0 && filters.top_k < (int64_t)tokens.size())
        tokens.resize((size_t)filters.top_k);
    while (tokens.back().logit < filters.lowest) tokens.pop_back();
    uint64_t total = 0, ahead = 0;
    for (const auto& token : tokens) total += plain_weight((token.logit - first) * inverse);
    int64_t best = -1;
    double score = -INFINITY;
    for (const auto& token : tokens) {
        if (filters.top_p < 1 && !((double)ahead < filters.top_p * (double)total)) break;
        ahead += plain_weight((token.logit - first) * inverse);
        const double own = (token.logit - first) / filters.temperature +
                           duetto::gumbel_noise(key, (uint32_t)token.id);
        if (own > score || (own == score && token.id < best)) best = token.id, score = own;
    }
    return best;
}

void test_filtered(int64_t size, float spread, unsigned seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, 1);
    Floats row(size);
    std::vector<duetto::Ranked> tokens, changed;
    for (int64_t i = 0; i < size; ++i) {
        row[i] = random() % 5 == 0 ? -INFINITY : normal(random) * spread;
        if (random() % 2) row[i] = std::round(row[i]);  // equal ones
        if (i == size / 2) row[i] = 2 * spread;
        double logit = row[i];
        if (random() % 20 == 0) {  // a change: a double
            logit += 1e-9;
            changed.push_back({logit, i});
            row[i] = -INFINITY;
        }
        tokens.push_back({logit, i});
    }
    const auto first =
        *std::min_element(tokens.begin(), tokens.end(),
                          [](const auto& a, const auto& b) { return a.is_ahead_of(b); });
    const duetto::Logits logits{row.data(), size, changed.data(), (int64_t)changed.size(), first};
    for (double temperature : {5e-324, 0.7, 1.0, 100.0})
        for (int64_t top_k : {(int64_t)0, (int64_t)1, (int64_t)7, size / 2, size - 1})
            for (double top_p : {1e-9, 0.5, 0.95, 1 - 1e-12, 1.0})
                for (double gap : {(double)INFINITY, 3.0, 0.0}) {
                    const duetto::Filters filters{temperature, top_k,
                                                  first.logit - gap * temperature, top_p};
                    const uint64_t key = random();
                    const int64_t want = plain_filtered(tokens, filters, key);
                    const int64_t got = duetto::draw_filtered(kernels(), logits, filters, key);
                    CHECK(got == want,
                          "size %ld, spread %g, temperature %g, top_k %ld, top_p %g, gap %g",
                          (long)size, spread, temperature, (long)top_k, top_p, gap);
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
    for (int64_t size : {1, 2, 15, 16, 17, 100, 1025, 3000})
        for (float spread : {0.0f, 0.01f, 3.0f, 30.0f})
            for (unsigned seed = 0; seed < (kSlow ? 1u : 4u); ++seed)
                test_filtered(size, spread, seed);
    // Random123's known answer: counter 0, key 0
    CHECK(duetto::philox(0, 0, 0) == 0x16554d9eca36314cu, "philox");
    return report("test_sampler");
}
