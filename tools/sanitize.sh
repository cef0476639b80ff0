#!/usr/bin/env bash
# Builds csrc/tests with sanitizers and runs them: kernels with ASan and UBSan once per instruction set
# that this machine can run, and whatever has threads with TSan as well.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=build/sanitize
CXX=${CXX:-g++}
FLAGS=(-std=gnu++20 -O1 -g -Wall -Wextra -Wno-psabi -ffp-contract=off -fno-math-errno -Icsrc -pthread)
MEMORY=(-fsanitize=address,undefined -fno-sanitize-recover=undefined)
THREADS=(-fsanitize=thread)
export TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=0  # a debugger's rights, in containers
mkdir -p "$OUT"

case $(uname -m) in
  x86_64) SETS=(baseline avx2 avx512_vnni avx512_bf16) ;;
  aarch64 | arm64) SETS=(baseline neon_dotprod) ;;
  *) SETS=(baseline) ;;
esac

flags_of() {
  local avx2="-mavx2 -mfma -mf16c"
  local vnni="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
  case $1 in
    baseline) ;;
    avx2) echo "$avx2" ;;
    avx512_vnni) echo "$vnni" ;;
    avx512_bf16) echo "$vnni -mavx512bf16" ;;
    neon_dotprod) echo "-march=armv8.2-a+dotprod" ;;
  esac
}

can_run() {
  local words
  words=" $(grep -m1 -E '^(flags|Features)' /proc/cpuinfo) "
  case $1 in
    baseline) true ;;
    avx2) [[ $words == *" avx2 "* && $words == *" fma "* && $words == *" f16c "* ]] ;;
    avx512_vnni) [[ $words == *" avx512_vnni "* ]] ;;
    avx512_bf16) [[ $words == *" avx512_bf16 "* ]] ;;
    neon_dotprod) [[ $words == *" asimddp "* ]] ;;
  esac
}

# TSan of older compilers does not know the layouts of newer kernels.
RUN=()
if setarch -R true 2>/dev/null; then RUN=(setarch -R); fi

kernel_test() {  # name, set
  # shellcheck disable=SC2046
  "$CXX" "${FLAGS[@]}" "${MEMORY[@]}" $(flags_of "$2") -DDUETTO_ISA="$2" "csrc/tests/test_$1.cpp" \
    csrc/pack.cpp csrc/attention_plan.cpp -o "$OUT/$1_$2"
  echo "-- $1, $2"
  "$OUT/$1_$2"
}

threads_test() {  # name, sources...
  local name=$1
  shift
  for kind in MEMORY THREADS; do
    local -n sanitizers=$kind
    "$CXX" "${FLAGS[@]}" "${sanitizers[@]}" -DDUETTO_ISA=baseline "csrc/tests/test_$name.cpp" "$@" \
      -o "$OUT/${name}_$kind"
    echo "-- $name, ${sanitizers[0]#-fsanitize=}"
    "${RUN[@]}" "$OUT/${name}_$kind"
  done
}

threads_test pool csrc/pool.cpp
threads_test plan csrc/{arena,attention_order,attention_plan,kv_arena,pack,plan,plan_check,pool,walk}.cpp \
  csrc/kernels/isa.cpp
for set in "${SETS[@]}"; do
  if can_run "$set"; then
    for name in rows attention linear; do kernel_test $name "$set"; done
  else
    echo "-- $set: not on this machine"
  fi
done
