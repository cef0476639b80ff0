"""What the tools of a request may be called, and where their schemas stand, in all APIs."""

from collections.abc import Sequence

from duetto.server.http.errors import cut, invalid


def check_tool_names(names: Sequence[str], place: str) -> None:
    """Raises ApiError 400 at the second of two tools with one name: a call could be of either.
    `place` is where the name of tool {} is in the body."""
    seen = set[str]()
    for index, name in enumerate(names):
        if name in seen:
            raise invalid(place.format(index), f"{cut(name)!r} is there twice")
        seen.add(name)


def schema_names(num_tools: int, field: str) -> dict[str, str]:
    """How a caller whose tools have their schemas in `field` calls each of them."""
    indexes = range(num_tools)
    return {f"tools[{at}].function.parameters": f"tools[{at}].{field}" for at in indexes}
