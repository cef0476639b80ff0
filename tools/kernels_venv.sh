#!/usr/bin/env bash
# kernels_venv.sh BEHIND VENV: make VENV, which has constraints-kernels.txt installed, and behind them
# whatever the environment BEHIND has: torch, the tests' tools, and Duetto with its native module.
set -euo pipefail
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

behind=$(packages "$1")
[ -x "$2/bin/python" ] || "$1/bin/python" -m venv "$2"
rm -f "$(packages "$2")/behind.pth" # pip looks at what VENV itself has
"$2/bin/python" -m pip install --quiet --disable-pip-version-check -r constraints-kernels.txt
# addsitedir also reads the .pth files there: Duetto's own is one.
echo "import site; site.addsitedir('$behind')" >"$(packages "$2")/behind.pth"
