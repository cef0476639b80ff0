#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "cpu_features.h"

namespace duetto {

namespace {

using Names = std::vector<std::string>;

std::vector<InstructionSet> examine() {
    const Names here = cpu_features();
    std::vector<InstructionSet> sets;
    auto add = [&](const Kernels* kernels, const Names& needed) {
        Names missing;
        for (const std::string& name : needed)
            if (std::find(here.begin(), here.end(), name) == here.end()) missing.push_back(name);
        sets.push_back({kernels, missing});
    };
    add(baseline_kernels(), {});
#if defined(__x86_64__)
    const Names avx2 = {"avx2", "fma", "f16c"};
    Names vnni = avx2;
    for (const char* name : {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
        vnni.emplace_back(name);
    Names bf16 = vnni;
    bf16.emplace_back("avx512_bf16");
    add(avx2_kernels(), avx2);
    add(avx512_vnni_kernels(), vnni);
    add(avx512_bf16_kernels(), bf16);
#elif defined(__aarch64__)
    add(neon_dotprod_kernels(), {"neon", "asimddp"});
#endif
    return sets;
}

std::string join(const Names& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets = examine();
    return sets;
}

const Kernels& choose_kernels(const std::string& name) {
    std::string wanted = name, origin;
    if (const char* variable = std::getenv("DUETTO_ISA"); wanted.empty() && variable != nullptr) {
        wanted = variable;
        origin = "DUETTO_ISA: ";
    }
    const Kernels* fastest = nullptr;
    Names can_run;
    for (const InstructionSet& set : instruction_sets()) {
        const bool is_wanted = wanted == set.kernels->name;
        if (is_wanted && set.missing.empty()) return *set.kernels;
        if (is_wanted)
            throw std::invalid_argument(origin + "this machine cannot run instruction set " +
                                        wanted + ": it has no " + join(set.missing));
        if (set.missing.empty()) {
            fastest = set.kernels;
            can_run.emplace_back(set.kernels->name);
        }
    }
    if (wanted.empty()) return *fastest;
    throw std::invalid_argument(origin + "no instruction set is called '" + wanted +
                                "'; this machine can run " + join(can_run));
}

}  // namespace duetto
