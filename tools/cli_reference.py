"""Write docs/cli.md from the commands themselves. `--check` only says whether it is current."""

import os
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
COMMANDS = (
    (),
    ("serve",),
    ("chat",),
    ("complete",),
    ("tokenize",),
    ("make-model",),
    ("bench",),
    ("bench", "latency"),
    ("bench", "throughput"),
    ("bench", "serve"),
    ("bench", "kernels"),
    ("roofline",),
    ("fit",),
    ("simulate",),
    ("plan",),
    ("calibrate",),
    ("explain",),
    ("cache",),
    *(("cache", command) for command in ("ls", "lookup", "pin", "unpin", "drop")),
    ("eval",),
    ("doctor",),
)


def help_of(command: tuple[str, ...]) -> str:
    """The command's help as a person sees it in a terminal of 100 columns."""
    run = subprocess.run(
        [sys.executable, "-m", "duetto", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
    )
    return "\n".join(line.rstrip() for line in run.stdout.strip().splitlines())


def reference() -> str:
    parts = ["# Command line\n\nWritten by `make docs` from the commands' own help.\n"]
    for command in COMMANDS:
        name = " ".join(("duetto", *command))
        parts.append(f"## `{name}`\n\n```text\n{help_of(command)}\n```\n")
    return "\n".join(parts)


def main() -> None:
    text = reference()
    if "--check" in sys.argv:
        current = TARGET.read_text() if TARGET.exists() else ""
        sys.exit(0 if current == text else f"{TARGET.name} is out of date: run `make docs`")
    TARGET.write_text(text)
    print(f"wrote {TARGET.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
