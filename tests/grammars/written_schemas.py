"""Schemas of every kind of keyword, drawn from a seed: each alone, with others, and nested.

All can be satisfied, and none needs more than a page of JSON. Whether an answer is valid is asked
of jsonschema, and of this module for formats that it checks only with more packages.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import jsonschema

Json = Any
NAMES = ("a", "b", "ab", "name", "age", "x", "a b", "é", 'quo"te', "back\\slash", "a/b", "~", "🙂")
TEXTS = ("a", "ab", "name", "", "x y", "20", "é", 'quo"te', "new\nline", "🙂", "null")
PATTERNS = (
    *("^[a-c]{2,}$", "ab", "^(a|b|x=)+$", "^a", "b$", "^[0-9]{3}-[0-9]{2}$", "^x?y*z+$"),
    *("^[^a]*$", r"^\d+(\.\d+)?$", r"^\w{1,4}$", "^(?:ab|ba){1,3}$", "^.{2,5}$", "[xyz]{2}"),
)
FORMATS = (
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
)
ANNOTATIONS: dict[str, Json] = {
    "title": "T",
    "description": "what it is",
    "default": None,
    "examples": [1, "a"],
    "$comment": "c",
    "deprecated": True,
    "readOnly": False,
}
KEYWORDS = (
    *("type", "const", "enum", "minLength", "maxLength", "pattern", "format", "minimum"),
    *("maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "items", "prefixItems"),
    *("minItems", "maxItems", "properties", "required", "additionalProperties"),
    *("patternProperties", "minProperties", "maxProperties", "anyOf", "oneOf", "allOf", "$ref"),
    *("$defs", "definitions", *ANNOTATIONS),
)


class SchemaWriter:
    """Writes one schema. What it refers to is gathered beside it."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Json] = {}

    def any(self, depth: int) -> Json:
        kinds = LEAVES if depth <= 0 else {**LEAVES, **NESTED, **NESTED}
        # Most of what is within something is a leaf.
        if depth > 0 and self.rng.random() < 0.4:
            kinds = NESTED
        return kinds[self.rng.choice([*kinds])](self, depth - 1)

    def value(self, depth: int = 2) -> Json:
        rng = self.rng
        match rng.randrange(8 if depth else 6):
            case 6:
                return [self.value(depth - 1) for _ in range(rng.randrange(3))]
            case 7:
                names = rng.sample(NAMES, rng.randrange(3))
                return {name: self.value(depth - 1) for name in names}
            case kind:
                plain = (None, rng.random() < 0.5, rng.randint(-99, 99), 2.5, 1e3)
                return plain[kind] if kind < len(plain) else rng.choice(TEXTS)

    # --- leaves ----------------------------------------------------------------------------------

    def plain(self, _: int) -> Json:
        return self.rng.choice([{"type": name} for name in TYPES] + [{}, True, {"type": "string"}])

    def several_types(self, _: int) -> Json:
        return {"type": self.rng.sample(TYPES, self.rng.randint(2, 4))}

    def const(self, _: int) -> Json:
        return {"const": self.value()}

    def enum(self, _: int) -> Json:
        values = [self.value() for _ in range(self.rng.randint(1, 6))]
        distinct = {json.dumps(each): each for each in values}
        if self.rng.random() < 0.3:
            return {"enum": ["only", 5, *distinct.values()], "type": ["string", "integer"]}
        return {"enum": [*distinct.values()]}

    def text_of_length(self, _: int) -> Json:
        least = self.rng.randint(0, 6)
        lengths = {"minLength": least, "maxLength": least + self.rng.randint(0, 8)}
        return {"type": "string", **self._some(lengths)}

    def text_of_pattern(self, _: int) -> Json:
        bounds = {"maxLength": self.rng.randint(8, 20)} if self.rng.random() < 0.3 else {}
        return {"type": "string", "pattern": self.rng.choice(PATTERNS), **bounds}

    def text_of_format(self, _: int) -> Json:
        return {"type": "string", "format": self.rng.choice(FORMATS)}

    def integer(self, _: int) -> Json:
        least = self.rng.choice([-(10**6), -300, -7, 0, 1, 18, 10**5])
        most = least + self.rng.choice([1, 5, 90, 10**4])
        bounds = self._bounds(least, most)
        return {"type": "integer", **self._some(bounds)}

    def number(self, _: int) -> Json:
        least = self.rng.choice([-1000.5, -2.25, 0, 0.125, 3, 99.5])
        most = least + self.rng.choice([0.5, 2, 1000.25])
        return {"type": "number", **self._some(self._bounds(least, most))}

    def multiple(self, _: int) -> Json:
        if self.rng.random() < 0.5:
            bounds = self._some({"minimum": -50, "maximum": 500})
            return {
                "type": "integer",
                "multipleOf": self.rng.choice([2, 3, 5, 7, 10, 64]),
                **bounds,
            }
        return {"type": "number", "multipleOf": self.rng.choice([0.5, 0.25, 2, 1.5])}

    # --- what holds others -----------------------------------------------------------------------

    def array(self, depth: int) -> Json:
        least = self.rng.randint(0, 2)
        sizes = {"minItems": least, "maxItems": least + self.rng.randint(0, 3)}
        return {"type": "array", "items": self.any(depth), **self._some(sizes)}

    def tuple(self, depth: int) -> Json:
        first = [self.any(depth) for _ in range(self.rng.randint(1, 3))]
        items = self.rng.choice([False, {"type": "null"}, {"type": "integer"}, None])
        schema: Json = {"type": "array", "prefixItems": first}
        schema |= {} if items is None else {"items": items}
        least = self.rng.randint(0, len(first) + (items is not False))
        return schema | self._some({"minItems": least, "maxItems": len(first) + 2})

    def record(self, depth: int) -> Json:
        properties = {name: self.any(depth) for name in self._names(1, 4)}
        schema: Json = {"type": "object", "properties": properties}
        schema["required"] = self.rng.sample([*properties], self.rng.randint(0, len(properties)))
        others: list[Json] = [False, False, True, {"type": "integer"}, {"enum": ["x", None]}]
        if self.rng.random() < 0.8:
            schema["additionalProperties"] = self.rng.choice(others)
        return schema

    def map(self, depth: int) -> Json:
        schema: Json = {"type": "object", "additionalProperties": self.any(depth)}
        if self.rng.random() < 0.5:
            return schema | self.rng.choice(
                [{"minProperties": 1}, {"maxProperties": 2}, {"maxProperties": 1}]
            )
        return schema | {"required": self._names(1, 2)}

    def patterned(self, depth: int) -> Json:
        patterns = {"^x_": self.any(depth), "^[0-9]+$": self.any(0)}
        schema: Json = {"type": "object", "patternProperties": self._some(patterns)}
        schema["additionalProperties"] = self.rng.choice([False, {"type": "boolean"}])
        if self.rng.random() < 0.4:
            schema["properties"] = {"name": self.any(0)}
            schema["required"] = ["name"]
        return schema

    def alternatives(self, depth: int) -> Json:
        return {"anyOf": [self.any(depth) for _ in range(self.rng.randint(1, 4))]}

    def one_of_types(self, _: int) -> Json:
        kinds = [self.text_of_length(0), self.integer(0), {"type": "null"}, {"type": "boolean"}]
        return {"oneOf": self.rng.sample([*kinds, {"type": "array", "items": True}], 3)}

    def one_of_tagged(self, depth: int) -> Json:
        def tagged(tag: str) -> Json:
            properties = {"kind": {"const": tag}, "value": self.any(min(depth, 1))}
            return {"type": "object", "properties": properties, "required": ["kind"]}

        return {"oneOf": [tagged(tag) for tag in ("a", "b", "c")[: self.rng.randint(2, 3)]]}

    def all_of_records(self, depth: int) -> Json:
        parts = [
            {"type": "object", "properties": {name: self.any(min(depth, 1))}, "required": [name]}
            for name in self._names(2, 3)
        ]
        return {"allOf": parts}

    def all_of_bounds(self, _: int) -> Json:
        parts = [{"minimum": 3}, {"maximum": 900}, {"multipleOf": 3}, {"type": "integer"}]
        return {"allOf": self.rng.sample(parts, self.rng.randint(2, 4)), "type": "integer"}

    def all_of_texts(self, _: int) -> Json:
        parts: list[Json] = [{"minLength": 2}, {"maxLength": 9}, {"pattern": "^[a-m]+$"}]
        return {"type": "string", "allOf": self.rng.sample(parts, self.rng.randint(1, 3))}

    def reference(self, depth: int) -> Json:
        return self._refer(self.any(depth))

    def narrowed_reference(self, _: int) -> Json:
        return self._refer({"type": "string", "maxLength": 9}) | {"minLength": 2}

    def list_of_itself(self, _: int) -> Json:
        name = self._name()
        properties = {"value": self.any(0), "next": {"$ref": self._path(name)}}
        node = {"type": "object", "properties": properties, "required": ["value"]}
        self.definitions[name] = node | {"additionalProperties": False}
        return {"$ref": self._path(name)}

    def tree_of_itself(self, _: int) -> Json:
        name = self._name()
        leaf = self.rng.choice([{"type": "null"}, {"type": "integer"}, {"const": "leaf"}])
        branch = {"type": "array", "items": {"$ref": self._path(name)}, "maxItems": 2}
        self.definitions[name] = {"anyOf": [leaf, branch]}
        return {"$ref": self._path(name)}

    def annotated(self, depth: int) -> Json:
        found = self.any(depth)
        while not isinstance(found, dict):
            found = self.any(depth)
        return {**self._some(ANNOTATIONS), **found}

    # --- how -------------------------------------------------------------------------------------

    def _names(self, least: int, most: int) -> list[str]:
        return self.rng.sample(NAMES, self.rng.randint(least, most))

    def _some(self, keywords: dict[str, Json]) -> dict[str, Json]:
        """One at least."""
        chosen = self.rng.sample([*keywords], self.rng.randint(1, len(keywords)))
        return {name: value for name, value in keywords.items() if name in chosen}

    def _bounds(self, least: float, most: float) -> dict[str, Json]:
        lower = self.rng.choice([{"minimum": least}, {"exclusiveMinimum": least - 1}])
        upper = self.rng.choice([{"maximum": most}, {"exclusiveMaximum": most + 1}])
        return {**lower, **upper}

    def _refer(self, schema: Json) -> dict[str, Json]:
        name = self._name()
        self.definitions[name] = schema
        return {"$ref": self._path(name)}

    def _name(self) -> str:
        return self.rng.choice(["T", "odd/na~me", "with-dash"]) + str(len(self.definitions))

    def _path(self, name: str) -> str:
        return "#/$defs/" + name.replace("~", "~0").replace("/", "~1")


TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
Write = Callable[[SchemaWriter, int], Json]
LEAVES: dict[str, Write] = {
    each.__name__: each
    for each in (
        *(SchemaWriter.plain, SchemaWriter.several_types, SchemaWriter.const, SchemaWriter.enum),
        *(SchemaWriter.text_of_length, SchemaWriter.text_of_pattern, SchemaWriter.text_of_format),
        *(SchemaWriter.integer, SchemaWriter.number, SchemaWriter.multiple),
    )
}
NESTED: dict[str, Write] = {
    each.__name__: each
    for each in (
        *(SchemaWriter.array, SchemaWriter.tuple, SchemaWriter.record, SchemaWriter.map),
        *(SchemaWriter.patterned, SchemaWriter.alternatives, SchemaWriter.one_of_types),
        *(SchemaWriter.one_of_tagged, SchemaWriter.all_of_records, SchemaWriter.all_of_bounds),
        *(SchemaWriter.all_of_texts, SchemaWriter.reference, SchemaWriter.narrowed_reference),
        *(SchemaWriter.list_of_itself, SchemaWriter.tree_of_itself, SchemaWriter.annotated),
    )
}


def written_schemas(count: int) -> list[Json]:
    """All different: every kind in its turn, at the top, deeper with every round of them."""
    kinds, found = [*LEAVES.values(), *NESTED.values()], dict[str, Json]()
    index = 0
    while len(found) < count:
        turn, kind = divmod(index, len(kinds))
        writer = SchemaWriter(Random(f"schema {index}"))
        schema = kinds[kind](writer, turn % 3)
        name = "definitions" if index % 5 == 0 else "$defs"
        whole = with_definitions(schema, writer.definitions, name)
        found.setdefault(json.dumps(whole), whole)
        index += 1
    return [*found.values()]


def with_definitions(schema: Json, definitions: dict[str, Json], name: str) -> Json:
    if not definitions:
        return schema
    whole = {**schema, "$defs": definitions}
    if name == "$defs":
        return whole
    text = json.dumps(whole).replace('"$defs"', f'"{name}"')
    return json.loads(text.replace("#/$defs/", f"#/{name}/"))


def as_parameters(schema: Json) -> dict[str, Json]:
    """A schema as that of a tool's arguments, which are an object."""
    if isinstance(schema, dict) and schema.get("type") == "object":
        return schema
    own, definitions = schema, {}
    if isinstance(schema, dict):
        own = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {
        "type": "object",
        "properties": {"value": own},
        "required": ["value"],
        "additionalProperties": False,
        **definitions,
    }


def keywords_in(schema: Json) -> Iterator[str]:
    """Those of it and of what is within; names of properties that are called so, too."""
    if isinstance(schema, dict):
        yield from schema
        for each in schema.values():
            yield from keywords_in(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from keywords_in(each)


# --- is it valid? --------------------------------------------------------------------------------

FORMAT_CHECKER = jsonschema.FormatChecker()
_DATE, _TIME = r"\d{4}-\d\d-\d\d", r"\d\d:\d\d:\d\d(\.\d+)?(Z|z|[+-]\d\d:\d\d)"


@FORMAT_CHECKER.checks("date-time", ValueError)
def _is_date_time(text: object) -> bool:
    if not isinstance(text, str):
        return True
    found = re.fullmatch(f"{_DATE}[Tt ]{_TIME}", text, re.ASCII)
    return found is not None and _can_be_read(text)


@FORMAT_CHECKER.checks("time", ValueError)
def _is_time(text: object) -> bool:
    if not isinstance(text, str):
        return True
    return re.fullmatch(_TIME, text, re.ASCII) is not None and _can_be_read(f"2000-01-01T{text}")


@FORMAT_CHECKER.checks("duration")
def _is_duration(text: object) -> bool:
    date, time = r"(\d+Y)?(\d+M)?(\d+D)?", r"(T(\d+H)?(\d+M)?(\d+S)?)?"
    if not isinstance(text, str):
        return True
    found = re.fullmatch(f"P(\\d+W|{date}{time})", text, re.ASCII)
    return found is not None and not text.endswith(("P", "T"))


@FORMAT_CHECKER.checks("hostname")
def _is_hostname(text: object) -> bool:
    label = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return not isinstance(text, str) or re.fullmatch(rf"{label}(\.{label})*", text) is not None


@FORMAT_CHECKER.checks("uri")
def _is_uri(text: object) -> bool:
    return not isinstance(text, str) or re.fullmatch(r"[A-Za-z][\w+.-]*:[!-~]*", text) is not None


def _can_be_read(text: str) -> bool:
    """Whether it is a moment; Python has no leap seconds, and no year 0, which is a leap year."""
    text = re.sub(r"^0000", "2000", text)
    text = re.sub(r":60(?=[.Zz+-])", ":59", text)
    text = re.sub(r"(\.\d{6})\d+", r"\1", text).upper()
    return datetime.datetime.fromisoformat(text) is not None


def is_valid(schema: Json, text: str) -> bool:
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMAT_CHECKER)
    return validator.is_valid(json.loads(text))
