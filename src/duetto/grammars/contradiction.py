"""Where a JSON schema that allows nothing contradicts itself, and by which of its keywords.

Asks one question of whoever compiles schemas: does this one allow nothing? Knows no library.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from duetto.grammars.json_schema import SchemaPath, shown_place

MAX_ASKED = 64  # schemas are compiled to find the place
MAX_NAMED = 6
_DEFINITIONS = ("$defs", "definitions")
_ALTERNATIVES = ("anyOf", "oneOf")
AllowsNothing = Callable[[Any], bool]


class Contradiction(NamedTuple):
    path: SchemaPath
    keywords: tuple[str, ...]  # none: the schema is false

    @property
    def message(self) -> str:
        place = shown_place(self.path)
        if not self.keywords:
            return f"allows nothing: at {place} it is false"
        if len(self.keywords) == 1:
            return f"allows nothing: at {place}, {self.keywords[0]} leaves no value"
        *some, last = self.keywords[:MAX_NAMED]
        return f"allows nothing: at {place}, {', '.join(some)} and {last} contradict each other"


def contradiction(schema: Any, allows_nothing: AllowsNothing) -> Contradiction:
    """The innermost one of a schema that allows nothing: without any of its keywords something
    would be allowed. After `MAX_ASKED` questions, the innermost that was found."""
    left = MAX_ASKED
    definitions = _some(schema, _DEFINITIONS)

    def is_empty(each: Any) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and allows_nothing(
            {**definitions, **each} if isinstance(each, Mapping) else each
        )

    path: SchemaPath = ()
    while isinstance(schema, Mapping):
        own = {name: value for name, value in schema.items() if name not in _DEFINITIONS}
        for name in [*own]:
            fewer = {other: value for other, value in own.items() if other != name}
            if is_empty(fewer):
                own = fewer
        own = _narrowed(own, is_empty)
        within = next((at for at, one in _within(own, definitions) if is_empty(one)), None)
        if within is None:
            return Contradiction(path, tuple(own))
        path, schema = _entered(path, schema, definitions, within)
    return Contradiction(path, ())


def _narrowed(schema: dict[str, Any], is_empty: AllowsNothing) -> dict[str, Any]:
    """With as few required properties as still allow nothing, so that each of hundreds need not be
    asked for."""
    properties, names = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or not isinstance(names, list):
        return schema
    while len(names) > 1:
        half = len(names) // 2
        parts = [
            {**schema, "properties": _some(properties, some), "required": some}
            for some in (names[:half], names[half:])
        ]
        narrower = next((part for part in parts if is_empty(part)), None)
        if narrower is None:
            break
        schema, names = narrower, narrower["required"]
    return schema


def _within(
    schema: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[tuple[SchemaPath, Any]]:
    """The schemas within one that a value of it has to fit, as far as they may be its fault."""
    if (referred := _path_of(schema.get("$ref"))) and _at(definitions, referred) is not None:
        yield ("$ref", *referred), _at(definitions, referred)
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping) and isinstance(required, list):
        yield from (
            (("properties", name), one) for name, one in properties.items() if name in required
        )
    if "items" in schema:
        yield ("items",), schema["items"]
    for name in ("allOf", "prefixItems", *_ALTERNATIVES):
        given = schema.get(name)
        if isinstance(given, list) and not (name in _ALTERNATIVES and len(given) > 1):
            yield from (((name, i), one) for i, one in enumerate(given))


def _entered(
    path: SchemaPath, schema: Any, definitions: Mapping[str, Any], within: SchemaPath
) -> tuple[SchemaPath, Any]:
    if within[0] == "$ref":
        return within[1:], _at(definitions, within[1:])
    return path + within, _at(schema, within)


def _path_of(reference: Any) -> SchemaPath:
    """Of a reference to the definitions of the same schema; others lead nowhere."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return ()
    parts = reference[2:].split("/")
    return tuple([part.replace("~1", "/").replace("~0", "~") for part in parts])


def _at(value: Any, path: SchemaPath) -> Any:
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            return None
    return value


def _some(schema: Any, names: Iterable[Any]) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        return {}
    return {name: schema[name] for name in names if isinstance(name, str) and name in schema}
