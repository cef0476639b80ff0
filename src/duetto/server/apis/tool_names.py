"""What the tools of a request may be called, in all APIs that have them."""

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
