"""Numbers as people write them: 4096, 4k, 512Mi, 16GB; times as 50ms or 2s.

One rule for every flag of every command: k, M, G and T are powers of 1000, Ki, Mi, Gi and Ti are
powers of 1024, in either case; a B may follow where the flag counts bytes. Python's callers give
plain ints.
"""

import re
from decimal import Decimal
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import App, ArgumentCollection

from duetto.core.errors import ConfigError

HELP = (
    "Whole numbers may have units: 4k is 4,000 and 4Ki is 4,096; M, G, T and Mi, Gi, Ti likewise "
    "(for bytes also MB, GiB, ...); times may be 50ms or 2s. Of a flag that is given twice the "
    "last one counts."
)
_UNITS = {"": 1} | {
    f"{letter}{binary}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for binary in ("", "i")
}
# Flags of times, and the seconds that a number without a unit counts in.
_TIMES = {
    "--target-itl": Decimal("0.001"),
    "--step-timeout-s": Decimal(1),
    "--shutdown-timeout": Decimal(1),
    "--sse-keep-alive-interval": Decimal(1),
    "--timeout": Decimal(1),
    "--ttl": Decimal(1),
    "--interval": Decimal(1),
    "--dwell-more": Decimal(1),
    "--dwell-fewer": Decimal(1),
}
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) ?(ms|s)", re.IGNORECASE)
_NUMBER = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?) ?([kmgt]i?)?(b)?", re.IGNORECASE)


def read_whole(text: str, *, in_bytes: bool = False) -> int:
    """The number; a B at its end only `in_bytes`. Raises ValueError for what is none, or no whole
    one: 1.5k is 1500, and 1.5 is refused."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or (match[3] and not in_bytes):
        raise ValueError(text)
    number = Decimal(match[1]) * _UNITS[(match[2] or "").lower()]
    if number != int(number):
        raise ValueError(text)
    return int(number)


def read_units(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Write out the units in every whole number and time of a command line, before it is converted.

    Raises ConfigError, naming the flag, for what is none.
    """
    for argument in arguments:
        is_whole, words = _accepted(argument.hint)
        if argument.name in _TIMES:
            for i, token in enumerate(argument.tokens):
                if token.value not in words:
                    written = _in_own_unit(argument.name, token.value, words)
                    argument.tokens[i] = token.evolve(value=written)
        if not is_whole:
            continue
        in_bytes = "bytes" in argument.field_info.name
        for i, token in enumerate(argument.tokens):
            if token.value not in words:
                flag = token.keyword or argument.name
                written = _written_out(flag, token.value, words, in_bytes=in_bytes)
                argument.tokens[i] = token.evolve(value=written)


def _written_out(flag: str, text: str, words: set[str], *, in_bytes: bool) -> str:
    try:
        return str(read_whole(text, in_bytes=in_bytes))
    except ValueError:
        like = "512MiB, 1GB or 1000000000" if in_bytes else "4096, 4Ki (the same) or 4k (4,000)"
        others = f", or {', '.join(sorted(words))}" if words else ""
        raise ConfigError(
            f"{flag} {text:.80}: must be a whole number, like {like}{others}"
        ) from None


def _in_own_unit(flag: str, text: str, words: set[str]) -> str:
    """A time in the unit that the flag counts in, which a number alone has already."""
    match = _TIME.fullmatch(text.strip())
    if match is not None:
        seconds = Decimal(match[1]) * (1 if match[2].lower() == "s" else Decimal("0.001"))
        return str(float(seconds / _TIMES[flag]))
    try:
        return str(float(text))
    except ValueError:
        unit = "seconds" if _TIMES[flag] == 1 else "milliseconds"
        others = f", or {', '.join(sorted(words))}" if words else ""
        raise ConfigError(
            f"{flag} {text:.80}: must be {unit}, or a time with its unit, like 50ms or 2s{others}"
        ) from None


def _accepted(hint: Any) -> tuple[bool, set[str]]:
    """Whether a flag of this type takes whole numbers only, and which words besides."""
    if get_origin(hint) is Annotated:
        return _accepted(get_args(hint)[0])
    if get_origin(hint) in (tuple, list):
        return _accepted(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return False, {str(word) for word in get_args(hint)}
    if get_origin(hint) in (Union, UnionType):
        found = [_accepted(each) for each in get_args(hint)]
        return any(is_whole for is_whole, _ in found), set().union(*(words for _, words in found))
    return hint is int, set()
