// Which instruction sets this build has, which of them this machine can run, and which one to use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace duetto {

struct InstructionSet {
    const Kernels* kernels;
    std::vector<std::string>
        missing;  // of what it needs (names of cpu_features); empty: it can run
};

const std::vector<InstructionSet>& instruction_sets();  // of this build, slowest first

// The set called `name`, or else by DUETTO_ISA in the environment, or else the fastest that can run.
// Throws std::invalid_argument, with the sets there are, for one that is unknown or cannot run.
const Kernels& choose_kernels(const std::string& name);

}  // namespace duetto
