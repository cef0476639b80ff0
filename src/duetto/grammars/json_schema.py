"""JSON schemas as grammars take them: bounded, with our options, and where in one a keyword stands.

What a keyword means is llguidance's to know; so is which ones there are.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from math import lcm
from typing import Any, NamedTuple

from duetto.core.errors import InvalidRequest

MAX_DEPTH = 100  # of objects and lists within each other
OPTIONS = "x-guidance"  # llguidance's own, for which there are fields
# Between the parts of JSON: what people and models write, and nothing that could go on for ever.
WHITESPACE = r"[\x20]{1,2}|\r?\n[\x20\t]{0,40}"
MAX_PLACE = 120  # characters
MAX_MULTIPLE = 10_000  # of multipleOf: about 0.1 s, and 5 MB
_LEAST_NUMBER = -(2**63) + 512
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
SchemaPath = tuple[str | int, ...]


class ImpossibleSchema(InvalidRequest):
    """No answer fits it: a mistake of its author, and no lack of support."""


class JsonOptions(NamedTuple):
    whitespace: str | None = WHITESPACE  # a regex; None: none at all
    closes_objects: bool = False  # no properties beside those that are named


def prepared_schema(text: str, field: str, options: JsonOptions) -> str:
    """The schema of this text with our options, as a grammar takes it. Raises InvalidRequest."""
    schema = read_json_text(text, field)
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(field, f"must be an object, not {type(schema).__name__}")
    if schema is False:
        raise ImpossibleSchema(field, "allows nothing: at # it is false")
    if schema is True:
        schema = {}
    check_numbers(schema, field)
    if (place := place_of(schema, OPTIONS)) is not None:
        raise InvalidRequest(field, f"{place} is not supported: its options are fields here")
    if options.closes_objects:
        _close_objects(schema)
    if options.whitespace is None:
        own: dict[str, Any] = {"whitespace_flexible": False}
    else:
        own = {"whitespace_pattern": options.whitespace}
    return json.dumps({OPTIONS: own} | schema, ensure_ascii=False)


def read_json_text(text: str, field: str) -> Any:
    """The value of a text that must be JSON, and not be nested too deeply."""
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise InvalidRequest(field, f"is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise InvalidRequest(field, f"is not valid JSON: {error!s:.100}") from None
    if _HALF.search(text):
        check_unicode(json.dumps(value, ensure_ascii=False), field)
    left = [(value, 1)]
    while left:
        each, depth = left.pop()
        if not isinstance(each, dict | list):
            continue
        if depth > MAX_DEPTH:
            raise InvalidRequest(field, f"is nested more than {MAX_DEPTH} deep")
        inner = each.values() if isinstance(each, dict) else each
        left += [(one, depth + 1) for one in inner]
    return value


def check_unicode(text: str, field: str) -> None:
    """Raises InvalidRequest where a half of a character stands without the other."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InvalidRequest(field, f"has {half}, which is half of a character") from None


def check_numbers(schema: Any, field: str) -> None:
    """Refuse the numbers that llguidance has no bound for. They may stand anywhere, as a reference
    can name any part of a schema.

    It recurses until its process ends where the most of a range is -2**63, to which it rounds what
    is nearest, and takes what is less for it. And it has a state for each remainder of a division,
    by the least common multiple where several schemas hold.
    """
    left: list[tuple[SchemaPath, Any]] = [((), schema)]
    multiples = 1
    while left:
        path, each = left.pop()
        if isinstance(each, dict | list):
            inner = each.items() if isinstance(each, dict) else enumerate(each)
            left += [((*path, key), one) for key, one in inner]
        elif not isinstance(each, int | float) or isinstance(each, bool):
            continue
        elif each <= _LEAST_NUMBER:
            words = f"{each!r:.40} is not supported: it must be above -2**63"
            raise InvalidRequest(field, f"{shown_place(path)}: {words}")
        elif path and path[-1] == "multipleOf" and each > 0:
            multiples = lcm(multiples, _digits(each))
            if multiples > MAX_MULTIPLE:
                words = f"has more than {MAX_MULTIPLE} remainders, with others of the schema"
                raise InvalidRequest(field, f"{shown_place(path)}: {each!r:.40} {words}")


def _digits(number: float) -> int:
    """Without a point, and without the zeros at either end of a fraction."""
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(exponent, int)
    size: int = 10 ** min(max(exponent, 0), 5)
    return int("".join(map(str, digits))) * size


def place_of(schema: Any, keyword: str) -> str | None:
    """Where a keyword stands in a schema, as a pointer; None: nowhere."""
    path = next((path for path, each in _schemas(schema) if keyword in each), None)
    return None if path is None else shown_place((*path, keyword))


def shown_place(path: SchemaPath) -> str:
    """A JSON pointer, as `$ref` writes it."""
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in path]
    place = "/".join(["#", *parts])
    return place if len(place) <= MAX_PLACE else place[: MAX_PLACE - 1] + "…"


def blamed_keyword(message: str, schema: Any) -> str | None:
    """The place of what a message of llguidance names: the first quoted word of it that is a
    keyword of the schema."""
    for word in re.findall(r"[\"'`]([^\"'`\s]{1,64})[\"'`]|\b([A-Za-z$]{3,32})\b", message):
        place = place_of(schema, word[0] or word[1])
        if place is not None:
            return place
    return None


# What holds schemas: by a name that the caller chose; values that hold none.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples", "required", "type")


def _schemas(schema: Any) -> Iterator[tuple[SchemaPath, dict[str, Any]]]:
    """A schema and those within it, with their places, as they are read."""
    left: list[tuple[SchemaPath, Any]] = [((), schema)]
    while left:
        path, each = left.pop()
        if not isinstance(each, dict):
            continue
        yield path, each
        inner: list[tuple[SchemaPath, Any]] = []
        for name, value in each.items():
            if name in _VALUES:
                continue
            if isinstance(value, dict) and name in _NAMED:
                inner += [((*path, name, key), one) for key, one in value.items()]
            elif isinstance(value, dict):
                inner.append(((*path, name), value))
            elif isinstance(value, list):
                inner += [((*path, name, i), one) for i, one in enumerate(value)]
        left += reversed(inner)


def _close_objects(schema: Any) -> None:
    """As vLLM does: an object that names properties has no others, unless it says more of them."""
    for _, each in _schemas(schema):
        if "properties" in each or "patternProperties" in each:
            each.setdefault("additionalProperties", False)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is too large a number")
    return number
