// kernels/rows.h and vmath.h against plain double precision, at awkward widths; a row's bits alone,
// in company and in place. Compiled once per instruction set (DUETTO_ISA).
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "kernels/rows.h"
#include "tests/check.h"

namespace {

namespace isa = duetto::DUETTO_ISA;
using duetto::Activation;
using Floats = std::vector<float>;

const int64_t kWidths[] = {1, 7, 8, 15, 16, 19, 64, 80, 99, 100, 111, 500, 2048};
const int64_t kRows[] = {0, 1, 5};

Floats random_floats(size_t count, unsigned seed, float spread = 3) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, spread);
    Floats values(count);
    for (float& v : values) v = normal(random);
    return values;
}

double ulps(float got, double want) {
    if ((double)got == want) return 0;
    const float near = std::fabs((float)want);
    const double step = (double)std::nextafter(near, INFINITY) - near;
    return std::fabs(got - want) / step;
}

// f(vector) at many numbers, each also at another lane among others
template <typename F, typename G>
void check_function(const char* name, F f, G exact, float from, float to, double tolerance) {
    const int steps = kSlow ? 20000 : 200000;
    double worst = 0;
    float at = 0;
    for (int i = 0; i < steps; ++i) {
        const float x = from + (to - from) * ((float)i / steps);
        float lanes[isa::kLanes], results[isa::kLanes];
        for (int lane = 0; lane < isa::kLanes; ++lane)
            lanes[lane] = from + (float)(lane * 37 + i % 101);
        const int place = i % isa::kLanes;
        lanes[place] = x;
        isa::store(results, f(isa::load(lanes)));
        const float alone = f(isa::set1(x))[0];
        CHECK(std::memcmp(&alone, &results[place], 4) == 0, "%s(%g): a lane depends on others",
              name, x);
        const double error = ulps(alone, exact((double)x));
        if (error > worst) worst = error, at = x;
    }
    std::printf("  %-18s %.2f ulp at %g\n", name, worst, at);
    CHECK(worst <= tolerance, "%s: %.2f ulp at %g", name, worst, at);
}

void test_functions() {
    const float inf = INFINITY, nan = std::nanf("");
    auto exp = [](isa::vf x) { return isa::exp(x); };
    check_function("exp", exp, [](double x) { return std::exp(x); }, -87.3f, 88.7f, 1.5);
    check_function(
        "exp2", [](isa::vf x) { return isa::exp2_nonpositive(x); },
        [](double x) { return std::exp2(x); }, -126, 0, 1.5);
    check_function(
        "tanh", [](isa::vf x) { return isa::tanh(x); }, [](double x) { return std::tanh(x); }, -12,
        12, 2.5);
    check_function(
        "silu", [](isa::vf x) { return isa::silu(x); },
        [](double x) { return x / (1 + std::exp(-x)); }, -80, 80, 3.5);
    auto at = [](auto f, float x) { return f(isa::set1(x))[0]; };
    CHECK(at(exp, -inf) == 0 && at(exp, -200) == 0, "exp of very negative numbers");
    CHECK(at(exp, inf) == inf && at(exp, 89) == inf, "exp of large numbers");
    CHECK(at(exp, 0) == 1 && std::isnan(at(exp, nan)), "exp of 0 and NaN");
    CHECK(std::fabs(at(exp, -100) - std::exp(-100.0)) < 1.5e-45, "subnormal exp");
    auto exp2 = [](isa::vf x) { return isa::exp2_nonpositive(x); };
    CHECK(at(exp2, 0) == 1 && at(exp2, -inf) == 0 && at(exp2, -3e38f) == 0, "exp2 of 0, -inf");
    CHECK(at(exp2, -1) == 0.5f && std::isnan(at(exp2, nan)), "exp2 of -1 and NaN");
    auto tanh = [](isa::vf x) { return isa::tanh(x); };
    CHECK(at(tanh, inf) == 1 && at(tanh, -inf) == -1 && at(tanh, 0) == 0, "tanh of infinity, 0");
    CHECK(std::isnan(at(tanh, nan)) && std::signbit(at(tanh, -0.0f)), "tanh of NaN, -0");
    auto silu = [](isa::vf x) { return isa::silu(x); };
    CHECK(at(silu, -1e30f) == 0 && at(silu, 1e30f) == 1e30f, "silu of large numbers");
    auto gelu = [](isa::vf x) { return isa::gelu_tanh(x); };
    CHECK(at(gelu, -1e12f) == 0 && at(gelu, 1e12f) == 1e12f && std::isnan(at(gelu, nan)),
          "gelu of large numbers");
}

void expect_near(const char* what, int64_t width, const float* got, const std::vector<double>& want,
                 double tolerance) {
    for (size_t i = 0; i < want.size(); ++i)
        CHECK(std::fabs(got[i] - want[i]) <= tolerance * std::fmax(std::fabs(want[i]), 1e-3),
              "%s, width %ld, column %zu: %.9g, not %.9g", what, (long)width, i, got[i], want[i]);
}

// Runs an operation on several rows with a leading dimension, on each row alone, and in place. All
// must have the same bits, those of `reference` nearly, and the padding must stay.
// run(x, ldx, out, ldo, rows); reference(row of x) -> row of out
template <typename Run, typename Reference>
void check_rows(const char* what, int64_t in_width, int64_t width, Run run, Reference reference,
                double tolerance, float spread = 3) {
    for (int64_t rows : kRows) {
        const int64_t ldx = in_width + 5, ldo = width + 3;
        const Floats x = random_floats((size_t)(rows * ldx), 7 + (unsigned)width, spread);
        Floats out((size_t)(rows * ldo), 77.0f);
        run(x.data(), ldx, out.data(), ldo, rows);
        for (int64_t row = 0; row < rows; ++row) {
            const float* from = x.data() + row * ldx;
            const float* got = out.data() + row * ldo;
            expect_near(what, width, got, reference(from), tolerance);
            CHECK(got[width] == 77.0f && got[width + 2] == 77.0f, "%s writes beyond width %ld",
                  what, (long)width);
            Floats alone((size_t)width), in_place(from, from + in_width);
            run(from, in_width, alone.data(), width, 1);
            run(in_place.data(), in_width, in_place.data(), in_width, 1);
            const size_t bytes = (size_t)width * 4;
            CHECK(std::memcmp(alone.data(), got, bytes) == 0, "%s, width %ld: alone", what,
                  (long)width);
            CHECK(std::memcmp(in_place.data(), got, bytes) == 0, "%s, width %ld: in place", what,
                  (long)width);
        }
    }
}

void test_rms_norm(int64_t width, int64_t group, float offset) {
    const Floats weight = random_floats((size_t)group, 3, 1);
    const float eps = 1e-6f;
    check_rows(
        "rms_norm", width, width,
        [&](const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows) {
            isa::rms_norm(x, ldx, out, ldo, rows, width, group, weight.data(), offset, eps);
        },
        [&](const float* x) {
            std::vector<double> want((size_t)width);
            for (int64_t start = 0; start < width; start += group) {
                double sum = 0;
                for (int64_t i = 0; i < group; ++i) sum += (double)x[start + i] * x[start + i];
                for (int64_t i = 0; i < group; ++i)
                    want[start + i] =
                        x[start + i] / std::sqrt(sum / group + eps) * ((double)weight[i] + offset);
            }
            return want;
        },
        1e-6);
}

void test_gated_act(int64_t width, Activation kind) {
    check_rows(
        "gated_act", 2 * width, width,
        [&](const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows) {
            isa::gated_act(x, ldx, out, ldo, rows, width, kind);
        },
        [&](const float* x) {
            std::vector<double> want((size_t)width);
            for (int64_t i = 0; i < width; ++i) {
                const double g = x[i];
                const double inner = std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
                const double act = kind == Activation::silu ? g / (1 + std::exp(-g))
                                                            : 0.5 * g * (1 + std::tanh(inner));
                want[i] = act * x[width + i];
            }
            return want;
        },
        2e-6);
}

void test_elementwise(int64_t width) {
    const Floats y = random_floats((size_t)width * 5, 5);
    check_rows(
        "add", width, width,
        [&](const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows) {
            isa::add(x, ldx, y.data(), 0, out, ldo, rows, width);
        },
        [&](const float* x) {
            std::vector<double> want((size_t)width);
            for (int64_t i = 0; i < width; ++i) want[i] = (double)(x[i] + y[i]);
            return want;
        },
        0);
    auto in_place = [width](auto f) {  // for functions that have no other way
        return [=](const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows) {
            for (int64_t row = 0; row < rows; ++row)
                std::memmove(out + row * ldo, x + row * ldx, (size_t)width * 4);
            f(out, ldo, rows);
        };
    };
    check_rows(
        "scale", width, width,
        in_place([&](float* x, int64_t ld, int64_t rows) { isa::scale(x, ld, rows, width, 1.7f); }),
        [&](const float* x) {
            std::vector<double> want((size_t)width);
            for (int64_t i = 0; i < width; ++i) want[i] = (double)(x[i] * 1.7f);
            return want;
        },
        0);
    check_rows(
        "soft_cap", width, width, in_place([&](float* x, int64_t ld, int64_t rows) {
            isa::soft_cap(x, ld, rows, width, 30.0f);
        }),
        [&](const float* x) {
            std::vector<double> want((size_t)width);
            for (int64_t i = 0; i < width; ++i) want[i] = std::tanh((double)x[i] / 30) * 30;
            return want;
        },
        5e-7, 40);
}

void test_rope(int64_t heads, int64_t head_dim, int64_t rotary_dim) {
    const int64_t half = rotary_dim / 2, width = heads * head_dim, rows = 4, ld = width + 2;
    const Floats x = random_floats((size_t)(rows * ld), 11),
                 angles = random_floats((size_t)(rows * half), 12, 100);
    Floats cos(angles.size()), sin(angles.size()), together = x;
    for (size_t i = 0; i < angles.size(); ++i)
        cos[i] = std::cos(angles[i]), sin[i] = std::sin(angles[i]);
    isa::rope(together.data(), ld, rows, heads, head_dim, rotary_dim, cos.data(), sin.data());
    for (int64_t row = 0; row < rows; ++row) {
        const float *from = x.data() + row * ld, *got = together.data() + row * ld;
        std::vector<double> want(from, from + ld);
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t i = 0; i < half; ++i) {
                const double a = from[head * head_dim + i], b = from[head * head_dim + half + i];
                const double c = cos[row * half + i], s = sin[row * half + i];
                want[head * head_dim + i] = a * c - b * s;
                want[head * head_dim + half + i] = b * c + a * s;
            }
        for (int64_t i = 0; i < ld; ++i)
            CHECK(std::fabs(got[i] - want[i]) <= 2e-6, "rope %ld/%ld, column %ld: %.9g, not %.9g",
                  (long)rotary_dim, (long)head_dim, (long)i, got[i], want[i]);
        Floats alone(from, from + ld);
        isa::rope(alone.data(), ld, 1, heads, head_dim, rotary_dim, cos.data() + row * half,
                  sin.data() + row * half);
        CHECK(std::memcmp(alone.data(), got, (size_t)ld * 4) == 0, "rope: a row depends on others");
    }
}

void test_all_finite() {
    for (int64_t width : kWidths) {
        Floats x = random_floats((size_t)width, 13);
        x[width / 2] = std::numeric_limits<float>::max();
        CHECK(isa::all_finite(x.data(), width), "width %ld", (long)width);
        for (float bad : {INFINITY, -INFINITY, std::nanf(""), -std::nanf("")})
            for (int64_t at : {(int64_t)0, width / 2, width - 1}) {
                Floats y = x;
                y[at] = bad;
                CHECK(!isa::all_finite(y.data(), width), "width %ld, %g at %ld", (long)width, bad,
                      (long)at);
            }
    }
    CHECK(isa::all_finite(nullptr, 0), "nothing is finite");
}

}  // namespace

int main() {
    test_functions();
    for (int64_t width : kWidths) {
        test_rms_norm(width, width, 0);
        test_rms_norm(width, width, 1);
        test_gated_act(width, Activation::silu);
        test_gated_act(width, Activation::gelu_tanh);
        test_elementwise(width);
    }
    for (int64_t head_dim : {16, 64, 80, 100, 128}) test_rms_norm(3 * head_dim, head_dim, 0);
    for (int64_t head_dim : {2, 16, 64, 80, 96, 100, 128}) test_rope(3, head_dim, head_dim);
    test_rope(3, 80, 32);
    test_rope(2, 64, 30);
    test_all_finite();
    return report("test_rows");
}
