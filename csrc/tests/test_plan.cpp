// A whole plan, under TSan (make sanitize): a barrier that is missing between two operations is a race
// that it reports. And: one thread and several give the same bits, few rows and many.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <vector>

#include "pack.h"
#include "tests/check.h"

using namespace duetto;

namespace {

constexpr int64_t kHidden = 128, kVocabulary = 200, kInner = 192, kBlockSize = 16, kNumBlocks = 60;

// A weight with numbers that follow from its place, and memory for it.
struct Packed {
    Packed(WeightFormat format, int32_t group, int64_t n, int64_t k) {
        std::vector<float> values(n * k);
        for (size_t i = 0; i < values.size(); ++i)
            values[i] = 0.1f * std::sin(0.37f * static_cast<float>(i % 9973));
        const PackedBytes bytes = packed_bytes(format, n, k, group);
        memory = Arena(bytes.data + bytes.scales);
        auto* scales = reinterpret_cast<uint16_t*>(memory.data() + bytes.data);
        weight = {format, group, n, k, pad8(k), memory.data(), bytes.scales > 0 ? scales : nullptr};
        const SourceRows source{values.data(), SourceType::f32, n, k};
        CHECK(pack_tiles(weight, &source, 1, 0, num_tiles(n), memory.data(), scales) == -1);
    }
    Arena memory;
    PackedWeight weight;
};

struct Weights {
    explicit Weights(WeightFormat format, int32_t group)
        : embed(format, group, kVocabulary, kHidden),
          qkv(format, group, 256, kHidden),
          out(format, group, kHidden, kHidden),
          gate_up(format, group, 2 * kInner, kHidden),
          down(format, group, kHidden, kInner),
          norm(kHidden, 1.0f) {}
    Packed embed, qkv, out, gate_up, down;
    std::vector<float> norm;
};

// Two layers; `fused`: norms and activations within the projections, else as operations of their own.
Ref build(Plan& plan, const Weights& w, bool fused) {
    const auto whole = [&](int64_t width) { return Ref{plan.buffer(width), 0, width}; };
    const Ref x = whole(kHidden), qkv = whole(256), attended = whole(kHidden),
              normed = whole(kHidden), gate_up = whole(2 * kInner), joined = whole(kInner),
              selected = whole(kHidden), logits = whole(kVocabulary);
    const Norm norm{w.norm.data(), 1e-6f, 0.0f};
    const Ref q{qkv.buffer, 0, 128}, k{qkv.buffer, 128, 64}, v{qkv.buffer, 192, 64};
    const int64_t spec = plan.rope_spec(std::vector<float>(16, 0.01f), 1.0);
    plan.embed(x, w.embed.weight, 1.5f, 0, kVocabulary);
    for (int64_t layer = 0; layer < 2; ++layer) {
        if (!fused) plan.rms_norm(x, normed, norm, kHidden);
        plan.linear(fused ? x : normed, qkv, w.qkv.weight, nullptr, false,
                    fused ? std::optional(norm) : std::nullopt, std::nullopt);
        plan.rope({qkv.buffer, 0, 192}, 32, spec);
        plan.write_kv(k, v, layer);
        plan.attention({q, attended, layer, 4, 2, 32, 0.18f, layer == 0 ? 0 : 700, 0.0f, 0});
        plan.linear(attended, x, w.out.weight, nullptr, true, std::nullopt, std::nullopt);
        plan.linear(x, gate_up, w.gate_up.weight, nullptr, false, norm, std::nullopt);
        if (!fused) plan.gated_act(gate_up, joined, Activation::silu);
        plan.linear(fused ? gate_up : joined, x, w.down.weight, nullptr, true, std::nullopt,
                    fused ? std::optional(Activation::silu) : std::nullopt);
    }
    if (!fused) plan.rms_norm(x, normed, norm, kHidden);
    plan.select_rows(fused ? x : normed, selected);
    plan.linear(selected, logits, w.embed.weight, nullptr, false,
                fused ? std::optional(norm) : std::nullopt, std::nullopt);
    plan.soft_cap(logits, 30.0f);
    return logits;
}

using Logits = std::map<int32_t, std::vector<float>>;  // by position

struct Walked {
    Logits logits;
    std::vector<int64_t> looked;  // what positions kFirstLooked ... get of all tokens
};
constexpr int32_t kFirstLooked = 3, kEndLooked = 575;

// One request's tokens in chunks; the logits of the last `share` of each chunk's rows.
Walked walk(Pool& pool, const Kernels& kernels, const Weights& weights, bool fused,
            const std::vector<int32_t>& chunks, double share) {
    Plan plan(pool, kernels);
    const Ref logits = build(plan, weights, fused);
    const KvArena kv(kernels, KvFormat::bf16, kNumBlocks, kBlockSize, {{2, 32}, {2, 32}});
    std::vector<int32_t> table(kNumBlocks);
    for (int32_t i = 0; i < kNumBlocks; ++i) table[i] = kNumBlocks - 1 - i;
    Walked all;
    std::vector<int64_t> looked(kEndLooked - kFirstLooked + 1);
    all.looked = looked;
    const Look look{0, 1, kFirstLooked, kEndLooked};
    int32_t position = 0;
    for (const int32_t count : chunks) {
        std::vector<int32_t> ids, positions, slots, rows;
        for (int32_t i = 0; i < count; ++i, ++position) {
            ids.push_back(position * 7 % kVocabulary);
            positions.push_back(position);
            slots.push_back(table[position / kBlockSize] * kBlockSize + position % kBlockSize);
            if (i >= (1 - share) * count) rows.push_back(i);
        }
        const int32_t starts[] = {0, count};
        const StepInput input{
            {count, 1, kNumBlocks, positions.data(), slots.data(), starts, &position, table.data()},
            ids.data(),
            rows.data(),
            static_cast<int64_t>(rows.size()),
            INT64_MAX,
            &look,
            1,
            looked.data()};
        const Result result = plan.run(input, &kv, logits);
        for (size_t i = 0; i < looked.size(); ++i) all.looked[i] += looked[i];
        CHECK(result.rows == input.num_logit_rows && result.width == kVocabulary);
        for (int64_t row = 0; row < result.rows; ++row) {
            const float* first = result.data + row * result.leading;
            all.logits[positions[rows[row]]].assign(first, first + result.width);
        }
    }
    return all;
}

void same_bits(const Kernels& kernels, WeightFormat format, int32_t group) {
    const Weights weights(format, group);
    const std::vector<int32_t> chunks = {5, 1, 1, 2, 60, 500, 1, 8, 3};
    Pool alone(1), three(3);
    const auto [expected, looked] = walk(alone, kernels, weights, true, {581}, 1.0);
    CHECK(looked.back() == 0);
    CHECK(std::all_of(looked.begin(), looked.end() - 1, [](int64_t sum) { return sum > 1000; }));
    CHECK(expected.size() == 581);
    for (const auto& [position, logits] : expected) {
        CHECK(std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }));
        CHECK(*std::max_element(logits.begin(), logits.end()) > 0.01f, "position %d", position);
    }
    for (Pool* pool : {&alone, &three}) {
        for (const bool fused : {true, false}) {
            if (kSlow && !fused && pool == &alone) continue;
            const auto [found, sums] = walk(*pool, kernels, weights, fused, chunks, 0.5);
            CHECK(sums == looked, "%d threads", pool->num_threads());
            CHECK(found.size() > 250);
            for (const auto& [position, logits] : found)
                CHECK(logits == expected.at(position), "format %d, %d threads, position %d",
                      static_cast<int>(format), pool->num_threads(), position);
        }
    }
}

}  // namespace

int main() {  // which instruction set makes no difference to who does what, and where threads wait
    const Kernels& kernels = *baseline_kernels();
    same_bits(kernels, WeightFormat::bf16, 0);
    same_bits(kernels, WeightFormat::int8, 128);
    return report("plan");
}
