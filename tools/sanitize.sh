#!/usr/bin/env bash
# Builds csrc/tests with sanitizers and runs them: everything with ASan and UBSan, the kernels once
# per instruction set that this machine can run; whatever has threads with TSan as well. Needs a C++
# compiler, nothing else. Says what ran, shows every report, and exits with 0 if there was none.
#
#   CXX=g++   the compiler
#   JOBS=2    how many tests are built and run at a time
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=build/sanitize
# GCC 12's own AVX-512 headers warn of what they mean to leave undefined (GCC bug 105593).
export QUIET="-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"
JOBS=${JOBS:-2}
export CXX=${CXX:-g++}
export TSAN_OPTIONS=halt_on_error=1
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1  # leaks: need a debugger's rights

PLAN="csrc/arena.cpp csrc/attention_order.cpp csrc/attention_plan.cpp csrc/group.cpp
  csrc/kv_arena.cpp csrc/pack.cpp csrc/plan.cpp csrc/plan_check.cpp csrc/pool.cpp csrc/walk.cpp
  csrc/sampler.cpp csrc/kernels/isa.cpp"

sources_of() {
  case $1 in
    plan | group) echo "csrc/tests/test_$1.cpp $PLAN" ;;
    sampler) echo "csrc/tests/test_sampler.cpp csrc/sampler.cpp" ;;
    ring) echo "csrc/tests/test_ring.cpp csrc/ring.cpp csrc/rows.cpp" ;;
    pool | pack) echo "csrc/tests/test_$1.cpp csrc/$1.cpp" ;;
    *) echo "csrc/tests/test_$1.cpp csrc/pack.cpp csrc/attention_plan.cpp" ;;
  esac
}

flags_of() {
  local avx2="-mavx2 -mfma -mf16c"
  local vnni="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
  case $1 in
    memory)  # (what is left out costs much, and ASan sees it too)
      echo "-fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all"
      ;;
    threads) echo "-fsanitize=thread" ;;
    avx2) echo "$avx2" ;;
    avx512_vnni) echo "$vnni" ;;
    avx512_bf16) echo "$vnni -mavx512bf16" ;;
    neon_dotprod) echo "-march=armv8.2-a+dotprod" ;;
  esac
}

can_run() {
  local words wanted
  words=" $(grep -m1 -E '^(flags|Features)' /proc/cpuinfo) "
  case $1 in
    baseline) wanted="" ;;
    avx2) wanted="avx2 fma f16c" ;;
    neon_dotprod) wanted=asimddp ;;
    *) wanted=$1 ;;
  esac
  for word in $wanted; do [[ $words == *" $word "* ]] || return 1; done
}

build() {  # test, sanitizer, set, program
  # shellcheck disable=SC2046
  "$CXX" -std=gnu++20 -O1 -g1 -Wall -Wextra -Werror $QUIET -Wno-psabi -ffp-contract=off -fno-math-errno -Icsrc \
    -pthread $(flags_of "$2") $(flags_of "$3") -DDUETTO_ISA="$3" $(sources_of "$1") -o "$4"
}

one() {  # "test sanitizer set": builds and runs it; says so in a line, or all that it said
  local name sanitizer set program seconds run=() TIMEFORMAT=%U
  read -r name sanitizer set <<<"$1"
  program=$OUT/${name}_${sanitizer}_$set
  # TSan of older compilers does not know the layouts of newer kernels.
  if [[ $sanitizer == threads ]] && setarch -R true 2>/dev/null; then run=(setarch -R); fi
  if seconds=$({ time { build "$name" "$sanitizer" "$set" "$program" && "${run[@]}" "$program"; } \
    >"$program.log" 2>&1; } 2>&1); then
    echo "ok      $name, $sanitizer, $set: $seconds s of processor time"
  else
    printf 'FAILED  %s, %s, %s:\n%s\n' "$name" "$sanitizer" "$set" "$(tail -n 60 "$program.log")"
    return 1
  fi
}

tests() {  # those that take longest come first
  local set sets
  case $(uname -m) in
    x86_64) sets="avx2 baseline avx512_vnni avx512_bf16" ;;
    aarch64 | arm64) sets="neon_dotprod baseline" ;;
    *) sets=baseline ;;
  esac
  echo "plan memory baseline"
  echo "plan threads baseline"
  echo "group memory baseline"
  echo "group threads baseline"
  echo "ring memory baseline"
  echo "ring threads baseline"
  for set in $sets; do
    if can_run "$set"; then
      printf '%s memory %s\n' linear "$set" attention "$set" look "$set" rows "$set" sampler "$set"
    else
      echo "no      $set: not on this machine" >&2
    fi
  done
  echo "pack memory baseline"
  echo "pool memory baseline"
  echo "pool threads baseline"
}

mkdir -p "$OUT"
export OUT PLAN
export -f one build sources_of flags_of
tests | xargs -P "$JOBS" -I '{}' bash -c 'one "$1"' _ '{}'
