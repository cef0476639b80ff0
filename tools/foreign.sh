#!/usr/bin/env bash
# The kernels' own tests for instruction sets that this machine may not have: NEON with dot product,
# compiled for aarch64 and run by qemu's user mode; AVX-512 as plain C++ of the same width
# (DUETTO_EMULATE_512 in csrc/kernels/simd.h: 1 with VNNI, 2 with bf16 products), which tells wrong
# layouts and sums, not wrong intrinsics. On Debian the first needs g++-aarch64-linux-gnu and
# qemu-user; without them it says so and goes on.
#
#   CXX=g++                             the compiler for AVX-512's twin
#   ARM_CXX=aarch64-linux-gnu-g++       the one for NEON
#   ARM_RUN='qemu-aarch64 -cpu max'     what runs its programs
#   JOBS=2                              how many tests are built and run at a time
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=build/foreign
# GCC 12's own AVX-512 headers warn of what they mean to leave undefined (GCC bug 105593).
export QUIET="-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"
export CXX=${CXX:-g++}
export ARM_CXX=${ARM_CXX:-aarch64-linux-gnu-g++}
export ARM_RUN=${ARM_RUN:-qemu-aarch64 -cpu max}

one() {  # "test set": builds and runs it; says so in a line, or all that it said
  local name set build run=() program
  read -r name set <<<"$1"
  program=$OUT/${name}_$set
  case $set in
    avx512_vnni) build="$CXX -mavx2 -mfma -mf16c -DDUETTO_EMULATE_512=1" ;;
    avx512_bf16) build="$CXX -mavx2 -mfma -mf16c -DDUETTO_EMULATE_512=2" ;;
    neon_dotprod)
      build="$ARM_CXX -static -march=armv8.2-a+dotprod"
      read -ra run <<<"$ARM_RUN"
      ;;
  esac
  # shellcheck disable=SC2086
  if { $build -std=gnu++20 -O2 -Wall -Wextra -Werror $QUIET -Wno-psabi -ffp-contract=off -fno-math-errno -Icsrc \
    -pthread -DDUETTO_EMULATED -DDUETTO_ISA="$set" "csrc/tests/test_$name.cpp" csrc/pack.cpp \
    csrc/attention_plan.cpp csrc/sampler.cpp -o "$program" && "${run[@]}" "$program"; } >"$program.log" 2>&1; then
    echo "ok      $name, $set, emulated"
  else
    printf 'FAILED  %s, %s:\n%s\n' "$name" "$set" "$(tail -n 60 "$program.log")"
    return 1
  fi
}

tests() {  # those that take longest come first
  local set sets="avx512_vnni avx512_bf16"
  if command -v "$ARM_CXX" >/dev/null && command -v "${ARM_RUN%% *}" >/dev/null; then
    sets="neon_dotprod $sets"
  else
    echo "no      neon_dotprod: needs $ARM_CXX and ${ARM_RUN%% *}" >&2
  fi
  if [[ $(uname -m) != x86_64 ]]; then
    sets=${sets/avx512_vnni avx512_bf16/}
    echo "no      avx512: its twin is built on x86-64" >&2
  fi
  for set in $sets; do printf '%s\n' "attention $set" "look $set" "linear $set" "rows $set" "sampler $set"; done
}

mkdir -p "$OUT"
export -f one
tests | xargs -P "${JOBS:-2}" -I '{}' bash -c 'one "$1"' _ '{}'
