"""Write docs/cli.md from the commands themselves. `--check` only says whether it is current."""

import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from duetto.cli.app import app

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
COMMANDS = (
    (),
    ("serve",),
    ("router",),
    ("worker",),
    ("chat",),
    ("complete",),
    ("run-batch",),
    ("tokenize",),
    ("make-model",),
    ("bench",),
    ("bench", "latency"),
    ("bench", "throughput"),
    ("bench", "serve"),
    ("bench", "kernels"),
    ("bench", "schedulers"),
    ("roofline",),
    ("fit",),
    ("simulate",),
    ("plan",),
    ("planner",),
    ("calibrate",),
    ("explain",),
    ("cache",),
    *(("cache", command) for command in ("ls", "lookup", "pin", "unpin", "drop")),
    ("eval",),
    ("doctor",),
)


def help_of(command: tuple[str, ...]) -> str:
    """The command's help as a person sees it in a terminal of 100 columns."""
    shown = StringIO()
    console = Console(file=shown, width=100, color_system=None, force_terminal=True)
    app([*command, "--help"], console=console, result_action="return_value")
    return "\n".join(line.rstrip() for line in shown.getvalue().strip().splitlines())


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
