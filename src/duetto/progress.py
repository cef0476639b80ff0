"""A progress bar on long work: on stderr, and only where a person is looking."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Bar:
    """How far a piece of work has come. Without a `Progress` it draws nothing."""

    def __init__(self, label: str, total: int | None, progress: Progress | None) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(label, total=total)

    def advance(self, count: int = 1) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def reach(self, done: int, total: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)


@contextmanager
def show_progress(label: str, *, total: int | None = None, visible: bool = True) -> Iterator[Bar]:
    """A bar for the time of the context. Nothing is drawn unless stderr is a terminal."""
    console = Console(stderr=True)
    if not visible or not console.is_terminal:
        yield Bar(label, total, None)
        return
    columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(label, total, progress)
