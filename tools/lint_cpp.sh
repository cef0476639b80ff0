#!/usr/bin/env bash
# The C++ of csrc/: its formatting, and the compiler's warnings as errors, for every instruction set
# that this machine's compiler can compile for. bindings.cpp is compiled where the module is built
# (it needs nanobind's headers). Needs clang-format (the `test` extra); says so if there is no compiler.
#
#   CXX=g++                     the compiler
#   CLANG_FORMAT=clang-format   the formatter
set -euo pipefail
cd "$(dirname "$0")/.."
CXX=${CXX:-g++}
CLANG_FORMAT=${CLANG_FORMAT:-clang-format}
"$CLANG_FORMAT" --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp
if ! command -v "$CXX" >/dev/null; then
  echo "no      warnings of the C++: there is no $CXX" >&2
  exit 0
fi

flags="-std=gnu++20 -fsyntax-only -Wall -Wextra -Wno-psabi -Wshadow -Wnon-virtual-dtor
  -Woverloaded-virtual -Werror -Icsrc -pthread"
avx2="-mavx2 -mfma -mf16c"
vnni="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
for source in csrc/*.cpp; do
  # shellcheck disable=SC2086
  [[ $source == csrc/bindings.cpp ]] || "$CXX" $flags "$source"
done
kernels() {  # set, its flags
  # shellcheck disable=SC2086
  "$CXX" $flags $2 -DDUETTO_ISA="$1" csrc/kernels/isa.cpp
}
kernels baseline ""
case $(uname -m) in
  x86_64)
    kernels avx2 "$avx2"
    kernels avx512_vnni "$vnni"
    kernels avx512_bf16 "$vnni -mavx512bf16"
    ;;
  aarch64 | arm64) kernels neon_dotprod -march=armv8.2-a+dotprod ;;
esac
