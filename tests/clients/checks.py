"""What the scripts beside this one share: named checks against a server that runs.

    python tests/clients/with_openai.py [URL [MODEL]]

Each script is for one client, unmodified, in an environment of its own; its exit code is 1 if a
check failed. `run.sh` makes them and runs all.
"""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
MODEL = sys.argv[2] if len(sys.argv) > 2 else "duetto-demo"
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Will it rain in Riga?"
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def needs(package: str, module: str) -> Any:
    """The module; the script ends as skipped without it."""
    os.environ.setdefault("OPENAI_API_KEY", "none")
    os.environ["OPENAI_BASE_URL"] = URL + "/v1"
    try:
        found = import_module(module)
    except ImportError:
        print(f"{package}: skipped, not installed")
        raise SystemExit(0) from None
    print(package, metadata.version(package))
    return found


def run(*checks: Callable[[], None]) -> None:
    """Run all, also after one that failed; a check fails by raising."""
    failed = 0
    for check in checks:
        try:
            check()
        except Exception:
            failed += 1
            print(f"  FAIL  {check.__name__}")
            print("        " + traceback.format_exc(limit=-4).strip().replace("\n", "\n        "))
        else:
            print(f"  ok    {check.__name__}")
    raise SystemExit(1 if failed else 0)
