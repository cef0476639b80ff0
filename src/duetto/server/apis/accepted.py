"""Fields that this version cannot honour: which of their values change nothing, and are accepted.

The rule is docs/decisions/0003. A struct declares such a field as `Annotated[Raw, Only(...)]`: its
value stays unread JSON until it is compared here. Declared as `Raw` alone it is a label, of which
any value is accepted.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, get_type_hints

import msgspec

from duetto.server.http.errors import ApiError, invalid

ABSENT = msgspec.Raw(b"null")
NOT_SUPPORTED = "is not supported in this version"
MAX_COMPARED_BYTES = 256  # of JSON; what changes nothing is short


class Only:
    """The values of a field that change nothing; null always does."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def accepts(self, raw: msgspec.Raw) -> bool:
        text = bytes(raw)
        if text == b"null":
            return True
        if len(text) > MAX_COMPARED_BYTES:
            return False
        value = msgspec.json.decode(text)
        return any(_are_same(value, known) for known in self.values)

    def refusal(self, field: str) -> ApiError:
        shown = ", ".join(msgspec.json.encode(value).decode() for value in self.values)
        return invalid(field, f"{NOT_SUPPORTED}; accepted: {shown}" if shown else NOT_SUPPORTED)


def _are_same(value: Any, known: Any) -> bool:
    """As JSON: 1 is 1.0, and neither is true."""
    return bool(value == known) and isinstance(value, bool) == isinstance(known, bool)


@cache
def limited(kind: type) -> tuple[tuple[str, Only], ...]:
    """The fields of a struct that are limited to some values, in the order of its class."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (name, mark)
        for name in kind.__struct_fields__  # type: ignore[attr-defined]
        for mark in getattr(hints[name], "__metadata__", ())
        if isinstance(mark, Only)
    )


@cache
def unread(kind: type) -> type[msgspec.Struct]:
    """A struct of these fields alone, which reads them also from a body with other faults."""
    fields = [(name, msgspec.Raw, ABSENT) for name, _ in limited(kind)]
    return msgspec.defstruct(f"Unread{kind.__name__}", fields)


def inner_refusals(values: msgspec.Struct, path: str = "") -> Iterator[ApiError]:
    """The same of all structs within these."""
    for name in values.__struct_fields__:
        value = getattr(values, name)
        if isinstance(value, msgspec.Struct):
            yield from refusals(value, type(value), f"{path}{name}.")
            yield from inner_refusals(value, f"{path}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if not isinstance(item, msgspec.Struct):
                    break
                yield from refusals(item, type(item), f"{path}{name}[{index}].")
                yield from inner_refusals(item, f"{path}{name}[{index}].")


def refusals(values: Any, kind: type, path: str = "") -> Iterator[ApiError]:
    """What the values of `kind`'s limited fields are refused for; `path` ends with a dot."""
    for name, only in limited(kind):
        raw = getattr(values, name)
        if raw is not ABSENT and not only.accepts(raw):
            yield only.refusal(path + name)
