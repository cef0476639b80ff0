"""gptme: its command line without tools, and with tools that the API is told of."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, needs, run

needs("gptme", "gptme")
# gptme takes an empty answer for a fault, and the demo model has none to what no document tells.
PROMPT = "Document: Nanchem is based in Gilcross.\nQuestion: Where is Nanchem based?"


def answers(*more):
    """What the assistant said; the server's model calls nothing of its own accord."""
    home = tempfile.mkdtemp()
    command = [
        str(Path(sys.executable).with_name("gptme")),
        *("--non-interactive", "--output-format", "json", "--context", "files"),
        *("--system", "Be short.", "--model", f"local/{MODEL}", *more, PROMPT),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "HOME": home},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [line for line in lines if line.get("role") == "assistant"]
    assert found and all(line["metadata"]["usage"]["output_tokens"] for line in found), lines
    return found


def without_tools():
    answers("--tools", "none")


def with_tools():
    answers("--tools", "todo", "--tool-format", "tool")


run(without_tools, with_tools)
