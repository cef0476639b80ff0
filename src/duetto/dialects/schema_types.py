"""Which JSON types a schema allows for a parameter, where a dialect writes values without type."""

import json
from collections.abc import Mapping
from typing import Any

from duetto.dialects.literals import PYTHON, NotALiteral, string_to_json, value_to_json

_MOST_STEPS = 64  # through references and alternatives: a schema may lead in circles
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}
_TYPES |= {list: "array", dict: "object", type(None): "null"}


def parameter_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """The types that a tool's parameter may have; only strings if nothing is said."""
    properties = schema.get("properties")
    others = schema.get("additionalProperties")
    parameter = properties.get(name, others) if isinstance(properties, Mapping) else others
    return frozenset(_types(parameter, schema)) or frozenset({"string"})


def typed_json(text: str, types: frozenset[str]) -> str:
    """What was written without quotes, as JSON of a type that is allowed; else as a string.

    A text that can be a string is one; null is meant where both are allowed.
    """
    bare = text.strip()
    if "null" in types and bare in ("null", "None"):
        return "null"
    if "string" in types:
        return string_to_json(text)
    if _is_json(bare):
        return bare
    try:
        return value_to_json(bare, PYTHON)
    except NotALiteral:
        return string_to_json(text)


def _types(start: Any, root: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    for _ in range(_MOST_STEPS):
        if not waiting:
            break
        schema = waiting.pop()
        if not isinstance(schema, Mapping):
            continue
        named = schema.get("type")
        types = named if isinstance(named, list) else [named]
        found |= {name for name in types if isinstance(name, str)}
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if named is None and isinstance(values, list):
            found |= {_TYPES[type(value)] for value in values if type(value) in _TYPES}
        for key in ("anyOf", "oneOf", "allOf"):
            alternatives = schema.get(key)
            waiting += alternatives if isinstance(alternatives, list) else []
        waiting.append(_referred(schema.get("$ref"), root))
    return found


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    """What `#/$defs/...` names."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    at: Any = root
    for part in reference[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        at = at.get(name) if isinstance(at, Mapping) else None
    return at


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity are no JSON

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
