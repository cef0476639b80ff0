#!/usr/bin/env bash
# The kernels' own tests for instruction sets that this machine may not have: NEON with dot product,
# compiled for aarch64 and run by qemu's user mode; AVX-512 as plain C++ of the same width
# (DUETTO_EMULATE_512 in csrc/kernels/simd.h: 1 with VNNI, 2 with bf16 products), which tells wrong
# layouts and sums, not wrong intrinsics. On Debian the first needs g++-aarch64-linux-gnu and
# qemu-user; without them it says so and goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=build/foreign
CXX=${CXX:-g++}
ARM_CXX=${ARM_CXX:-aarch64-linux-gnu-g++}
ARM_RUN=${ARM_RUN:-qemu-aarch64 -cpu max}
FLAGS="-std=gnu++20 -O1 -Wall -Wextra -Wno-psabi -ffp-contract=off -fno-math-errno -Icsrc -pthread"
mkdir -p "$OUT"

one() {  # name, set, compiler and its flags, what runs the program
  local program=$OUT/${1}_$2
  # shellcheck disable=SC2086
  $3 $FLAGS -DDUETTO_ISA="${2%%.*}" "csrc/tests/test_$1.cpp" csrc/pack.cpp csrc/attention_plan.cpp \
    -o "$program"
  # shellcheck disable=SC2086
  $4 "$program" >"$program.log" || { cat "$program.log"; echo "FAILED  $1, $2"; return 1; }
  echo "ok      $1, $2"
}

for name in linear attention rows; do
  one $name "avx512_vnni.emulated" "$CXX -mavx2 -mfma -mf16c -DDUETTO_EMULATE_512=1" ""
  one $name "avx512_bf16.emulated" "$CXX -mavx2 -mfma -mf16c -DDUETTO_EMULATE_512=2" ""
done
if command -v "$ARM_CXX" >/dev/null && command -v "${ARM_RUN%% *}" >/dev/null; then
  for name in linear attention rows; do
    one $name neon_dotprod "$ARM_CXX -static -march=armv8.2-a+dotprod" "$ARM_RUN"
  done
else
  echo "no      neon_dotprod: needs $ARM_CXX and ${ARM_RUN%% *}"
fi
