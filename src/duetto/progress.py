"""A progress bar on long work: on stderr, and only where a person is looking."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def show_progress(label: str, *, visible: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield `report(done, total)`. Nothing is drawn unless stderr is a terminal."""
    console = Console(stderr=True)
    if not visible or not console.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
