"""The process in which parts run: one after the other, so that torch is loaded once.

Reads a line of JSON for each part, {"part": ..., "found": {...}, "limit_s": ..., "folder": ...},
and answers with one. What a part prints goes to stderr. Ends with its input. Whoever started it
ends it if a part takes too long.
"""

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    from gpu.bench import Bench
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is not installed: this is for a machine with an NVIDIA GPU, and a python "
        f"that has torch and triton (pip install 'duetto[cuda]'; make gpu GPU_PYTHON=...)"
    )

from gpu.plan import PARTS

LAST_LINES = 12


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    bench = Bench.open(rehearse="--rehearse" in sys.argv)
    _answer(answers, {"about": bench.about()})
    for line in sys.stdin:
        asked = json.loads(line)
        bench.found, bench.limit_s = asked["found"], asked["limit_s"]
        bench.folder = Path(asked["folder"])
        try:
            _answer(answers, {"found": _run(asked["part"], bench)})
        except Exception:
            text = traceback.format_exc()
            print(text, file=sys.stderr, flush=True)
            _answer(answers, {"error": "\n".join(text.splitlines()[-LAST_LINES:])})
        bench.tidy()


def _run(name: str, bench: Bench) -> Any:
    part = next(one for one in PARTS if one.name == name)
    module = import_module(part.home)
    return getattr(module, name if part.module else "run")(bench)


def _answer(to: Any, value: Any) -> None:
    to.write(json.dumps(value) + "\n")
    to.flush()


if __name__ == "__main__":
    main()
