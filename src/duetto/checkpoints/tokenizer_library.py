"""Calls into the `tokenizers` library, which is written in Rust and may panic.

A panic (a regular expression that gives up, a slice out of range) reaches Python as
pyo3_runtime.PanicException, which is no Exception: nothing that catches errors would catch it, and
it would end the thread that it happens in. So whatever calls the library with a file's or a
client's data does it through here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from duetto.core.errors import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")


class LibraryError(Exception):
    """The library refused or panicked; the message is its own, in one line."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(" ".join(str(cause).split())[:200])
        self.is_panic = is_panic(cause)


def is_panic(error: BaseException) -> bool:
    """The class cannot be imported, so it is told by its name."""
    return type(error).__name__ == "PanicException"


def call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the library. Raises LibraryError for whatever goes wrong in it."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        raise library_error(error) from error


def library_error(error: BaseException) -> LibraryError:
    """What was raised around the library, where `call` would cost too much: for each token.

    Raises it again if it is neither an error nor a panic.
    """
    if not isinstance(error, Exception) and not is_panic(error):
        raise error
    return LibraryError(error)


@contextmanager
def refusing_panics(file: Path) -> Iterator[None]:
    """Within it, a panic or a LibraryError is a CheckpointError that names the file."""
    try:
        yield
    except LibraryError as error:
        raise CheckpointError(file, f"the tokenizers library fails on it: {error}") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        cause = LibraryError(error)
        raise CheckpointError(file, f"the tokenizers library fails on it: {cause}") from error
