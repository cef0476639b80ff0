// What this processor, and the operating system's register state, let a kernel use.
#pragma once

#include <string>
#include <vector>

namespace duetto {

// Names as in /proc/cpuinfo ("avx2", "avx512_vnni", ...), most basic first; empty where unknown.
std::vector<std::string> cpu_features();

}  // namespace duetto
