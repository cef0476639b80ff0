"""aider: one message without a terminal, streamed and not, with and without files to edit."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, URL, needs, run

needs("aider-chat", "aider")
# Turns as the demo model has them: to most of aider's own prompt it has no answer.
PROMPT = (
    "<|end|>\n<|user|>\nDocument: Nanchem is based in Gilcross.\n"
    "Question: Where is Nanchem based?<|end|>\n<|assistant|>"
)
QUIET = (
    *("--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-pretty"),
    *("--no-show-model-warnings", "--no-show-release-notes", "--no-fancy-input"),
    *("--map-tokens", "0"),
)


def answers(*more):
    home = tempfile.mkdtemp()
    (Path(home) / "notes.txt").write_text("Gilcross\n")
    command = [
        str(Path(sys.executable).with_name("aider")),
        *("--model", f"openai/{MODEL}", "--openai-api-base", f"{URL}/v1"),
        *(*QUIET, *more, "--message", PROMPT),
    ]
    # LITELLM_...: it would ask GitHub for prices
    env = {**os.environ, "HOME": home, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        command,
        env=env,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"Tokens: .* [1-9]\d* received", done.stdout), done.stdout


def asks_streamed():
    answers("--edit-format", "ask", "--stream")


def edits_whole_files():
    answers("--edit-format", "whole", "--no-stream", "notes.txt")


run(asks_streamed, edits_whole_files)
