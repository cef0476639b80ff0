"""Text from stdin, or the refusal of what is no text."""

import sys
from collections.abc import Callable

from duetto.core.errors import ConfigError


def read_stdin() -> str:
    """All of stdin. Raises ConfigError if it is not UTF-8."""
    return _text(lambda: sys.stdin.read())


def read_line(prompt: str) -> str:
    """A line, asked for by `prompt`. Raises EOFError at the end, ConfigError if it is not UTF-8."""
    return _text(lambda: input(prompt))


def _text(read: Callable[[], str]) -> str:
    """By its locale Python either refuses a byte that is not UTF-8, or lets it in as half a
    surrogate pair, which nobody downstream could name."""
    try:
        text = read()
        text.encode()
    except UnicodeError:
        raise ConfigError("stdin: is not text in UTF-8") from None
    return text
