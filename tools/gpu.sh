#!/usr/bin/env bash
# For a machine with a GPU, with torch and triton in its `python3`, and no network.
#
#   tools/gpu.sh wheels      here: put what Duetto needs beside them into .whl/
#   tools/gpu.sh run [...]   there: install that into a folder of its own, then run all of `make gpu`
#
# Figures come to $OUT/gpu.json (.gpu/gpu.json without OUT). A gpu.json in .gpu/ is gone on with.
# No part needs the native module, so nothing is compiled.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES="cyclopts docstring_parser rich-rst rich httptools httpx2 httpcore2 truststore idna llguidance
ml_dtypes msgspec prometheus_client starlette threadpoolctl uvicorn uvloop"
PYTHON_VERSION=3.12
SITE=${SITE:-/tmp/duetto-site}

wheels() {
  local wanted=() platforms=() package
  for package in $PACKAGES; do
    wanted+=("$(grep -i "^${package//[-_]/[-_]}==" constraints.txt)")
  done
  for platform in manylinux_2_{39..17}_x86_64 manylinux_2_5_x86_64 manylinux{2014,1}_x86_64; do
    platforms+=(--platform "$platform")
  done
  rm -rf .whl
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$PYTHON_VERSION" --implementation cp "${platforms[@]}" -d .whl "${wanted[@]}"
  du -sh .whl
}

run() {
  local out=${OUT:-.gpu}
  mkdir -p "$out"
  [ -e "$out/gpu.json" ] || [ ! -e .gpu/gpu.json ] || cp .gpu/gpu.json "$out/"
  if [ -d .whl ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --disable-pip-version-check --target "$SITE" .whl/*.whl
  fi
  export PYTHONPATH="$PWD/src:$SITE${PYTHONPATH:+:$PYTHONPATH}"
  python3 -u benchmarks/gpu/run.py --out "$out" "$@"
}

case "${1:-}" in
  wheels) wheels ;;
  run) run "${@:2}" ;;
  *) sed -n '2,9p' "$0" | cut -c3- && exit 2 ;;
esac
