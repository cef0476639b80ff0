"""The command line called here, for tests whose subject is not the process: a start costs a second.

What only a process shows (signals, a terminal, a full disk behind stdout, variables that are read
when a module loads) is tested with one.
"""

import os
import sys
import warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from duetto.cli.app import main


def duetto(
    *words: str | Path | int, stdin: str | None = None, **variables: str
) -> CompletedProcess[str]:
    """What `python -m duetto` with these words prints, and its exit code. An exception that would
    be a traceback there is raised."""
    command = ["duetto", *map(str, words)]
    out, err = _Output(), _Output()
    with ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", command))
        stack.enter_context(patch.object(sys, "stdin", StringIO(stdin or "")))
        stack.enter_context(patch.dict(os.environ, variables))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        # Cyclopts warns of tests that let it read sys.argv, as is meant here.
        warnings.filterwarnings("ignore", message="Cyclopts application invoked without tokens")
        code = _run()
    return CompletedProcess(command, code, out.text, err.text)


def _run() -> int:
    """The exit code, after what Python itself does at an exit with words."""
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


class _Output(TextIOWrapper):
    """A pipe, as far as the writer can tell, whose text can be read although it was closed."""

    def __init__(self) -> None:
        self._bytes = _Kept()
        super().__init__(self._bytes, encoding="utf-8", write_through=True)

    @property
    def text(self) -> str:
        if not self.closed:
            self.flush()
        return self._bytes.kept.decode()


class _Kept(BytesIO):
    kept = b""

    def write(self, data) -> int:
        self.kept += bytes(data)
        return len(data)
