"""Flags of an engine that have a short name, beside the one that their field gives them."""

from collections.abc import Sequence

_LONG = {"--tp": "--tensor-parallel-size", "--pp": "--pipeline-parallel-size"}
_WITH_THEIR_OWN = {"fit", "plan", "roofline", "simulate"}  # commands


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """A command line with the names that commands know."""
    if not arguments or arguments[0] in _WITH_THEIR_OWN:
        return list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found = []
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        is_short = name in _LONG and place < end
        found.append(f"{_LONG[name]}{equals}{value}" if is_short else argument)
    return found
