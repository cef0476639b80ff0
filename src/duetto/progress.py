"""A progress bar on long work: on stderr, and only where a person is looking.

Elsewhere a line now and then, for work of minutes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Bar:
    """How far a piece of work has come. Without a `Progress` it draws nothing, and with
    `lines_every_s` writes a line to stderr at most that often."""

    def __init__(
        self,
        label: str,
        total: int | None,
        progress: Progress | None,
        lines_every_s: float | None = None,
    ) -> None:
        self._label = label
        self._lines_every_s = lines_every_s
        self._last_line = -inf
        self._progress = progress
        self._task = None if progress is None else progress.add_task(label, total=total)

    def advance(self, count: int = 1) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def reach(self, done: int, total: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)
        elif self._lines_every_s is not None:
            now = monotonic()
            if done == total or now - self._last_line >= self._lines_every_s:
                self._last_line = now
                print(f"{self._label}: {done} of {total}", file=sys.stderr, flush=True)


@contextmanager
def show_progress(
    label: str,
    *,
    total: int | None = None,
    visible: bool = True,
    lines_every_s: float | None = None,
) -> Iterator[Bar]:
    """A bar for the time of the context. Where stderr is no terminal nothing is drawn; with
    `lines_every_s` a line says how far it is, at most that often."""
    console = Console(stderr=True)
    if not visible or not console.is_terminal:
        yield Bar(label, total, None, lines_every_s if visible else None)
        return
    columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(label, total, progress)
