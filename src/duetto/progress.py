"""A progress bar on long work: on stderr, and only where a person is looking."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def show_progress(
    label: str, total: int, *, visible: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`. Nothing is drawn unless stderr is a terminal."""
    console = Console(stderr=True)
    if not visible or not console.is_terminal:
        yield lambda _count: None
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
