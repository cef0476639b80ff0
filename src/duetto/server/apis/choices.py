"""Which values a body takes where only some are: read from its struct, so that none is forgotten.

Knows no field by name.
"""

import re
from collections.abc import Iterable

from msgspec import inspect


def choices_at(kind: type, path: str) -> list[str]:
    """Of the field at this place ("messages[0].role"); none where it takes more than names."""
    types: list[inspect.Type] = [inspect.type_info(kind)]
    names: Iterable[str] = re.findall(r"[^.\[\]]+", path)
    for name in names:
        types = [inner for each in types for inner in _within(each, name)]
    values = [
        str(value)
        for each in types
        for one in _alternatives(each)
        if isinstance(one, inspect.LiteralType)
        for value in one.values
    ]
    return list(dict.fromkeys(values))


def _within(given: inspect.Type, name: str) -> list[inspect.Type]:
    """What stands in a value of this type under a name, or at an index."""
    found: list[inspect.Type] = []
    for each in _alternatives(given):
        if isinstance(each, inspect.StructType):
            if each.tag is not None and name == each.tag_field:
                found.append(inspect.LiteralType((str(each.tag),)))
            found += [field.type for field in each.fields if field.encode_name == name]
        elif isinstance(each, inspect.ListType) and name.isdecimal():
            found.append(each.item_type)
        elif isinstance(each, inspect.DictType):
            found.append(each.value_type)
    return found


def _alternatives(given: inspect.Type) -> tuple[inspect.Type, ...]:
    if isinstance(given, inspect.UnionType):
        return given.types
    if isinstance(given, inspect.Metadata):
        return _alternatives(given.type)
    return (given,)
