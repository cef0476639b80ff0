"""The fields that say what an answer must look like, as OpenAI, vLLM, SGLang and llama.cpp name
them, and the one constraint that they ask for. Knows no grammar.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from msgspec import Struct

from duetto.core.errors import InvalidRequest
from duetto.core.structured import FIELD, StructuredOutputsParams
from duetto.server.http.errors import cut, invalid

logger = logging.getLogger(__name__)

MAX_NAME = 64
Schema = dict[str, Any] | bool


class JsonSchemaFormat(Struct, forbid_unknown_fields=True):
    name: str
    schema: Schema | None = None
    description: str | None = None
    strict: bool | None = None  # a constraint is always strict here


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    schema: Schema | None = None  # beside json_object, as llama.cpp has it
    # Of a structural tag, in either of its notations.
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's."""

    json: Schema | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None


class Constraining(Protocol):
    """A body with these fields."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: Schema | str | None
    guided_json_object: bool | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    guided_whitespace_pattern: str | None
    grammar: str | None
    json_schema: Schema | str | None
    regex: str | None
    ebnf: str | None


class GivenConstraint(NamedTuple):
    field: str  # the caller's own
    values: Mapping[str, Any]  # of StructuredOutputsParams


# Fields of other names for what structured_outputs has: vLLM's older ones, llama.cpp's, SGLang's.
_ALIASES = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


def structured_outputs(request: Constraining) -> StructuredOutputsParams | None:
    """The constraint that a body asks for. Raises ApiError 400, naming the field."""
    asked = _asked(request)
    if not asked:
        return None
    if len(asked) > 1:
        others = " and ".join(one.field for one in asked[1:])
        raise invalid(asked[0].field, f"beside {others}: an answer has one constraint")
    (one,) = asked
    if one.field.startswith("guided_"):
        logger.info("%s: the older name of structured_outputs.%s", one.field, _ALIASES[one.field])
    try:
        return StructuredOutputsParams(**one.values)
    except InvalidRequest as error:
        field = error.field.removeprefix(f"{FIELD}.")
        if one.field == FIELD:
            raise invalid(error.field, error.message) from None
        named = one.field if field in (FIELD, *one.values) else f"{one.field}.{field}"
        raise invalid(named, error.message) from None


def constraint_names(request: Constraining) -> dict[str, str]:
    """Our names of the constraint's field to the caller's."""
    asked = _asked(request)
    if not asked or asked[0].field == FIELD:
        return {}
    field = asked[0].field
    return {f"{FIELD}.{name}": field for name in asked[0].values} | {FIELD: field}


def _asked(request: Constraining) -> list[GivenConstraint]:
    found = []
    if (format_ := request.response_format) is not None:
        found += _of_format(format_)
    if (given := request.structured_outputs) is not None:
        values = {name: getattr(given, name) for name in given.__struct_fields__}
        found.append(GivenConstraint(FIELD, {k: v for k, v in values.items() if v is not None}))
    for field, name in _ALIASES.items():
        value = getattr(request, field)
        if value in (None, "") or (value is False and name == "json_object"):
            continue  # as clients write that they want none; a schema may be false, a flag is not
        values = {name: value}
        if field.startswith("guided_json") and request.guided_whitespace_pattern:
            values["whitespace_pattern"] = request.guided_whitespace_pattern
        found.append(GivenConstraint(field, values))
    return found


def _of_format(given: ResponseFormat) -> list[GivenConstraint]:
    """One, or none for the type text."""
    has_tag = (given.structures, given.triggers, given.format) != (None, None, None)
    if has_tag and given.type != "structural_tag":
        raise invalid("response_format.type", "must be structural_tag beside its fields")
    if given.json_schema is not None and given.type != "json_schema":
        raise invalid("response_format.json_schema", f"is not for the type {given.type}")
    if given.schema is not None and given.type != "json_object":
        raise invalid("response_format.schema", f"is not for the type {given.type}")
    if given.type == "text":
        return []
    if given.type == "json_object":
        if given.schema is None:
            return [GivenConstraint("response_format", {"json_object": True})]
        return [GivenConstraint("response_format.schema", {"json": given.schema})]
    if given.type == "structural_tag":
        tag: dict[str, Any] = {"format": given.format} if given.format is not None else {}
        if given.structures is not None or given.triggers is not None:
            tag |= {"structures": given.structures, "triggers": given.triggers}
        return [GivenConstraint("response_format", {"structural_tag": tag})]
    if given.json_schema is None:
        raise invalid("response_format.json_schema", "is required for the type json_schema")
    if not 1 <= len(given.json_schema.name) <= MAX_NAME:
        name = cut(repr(given.json_schema.name))
        raise invalid(
            "response_format.json_schema.name", f"must have 1 to {MAX_NAME} characters, not {name}"
        )
    if given.json_schema.schema is None:
        raise invalid("response_format.json_schema.schema", "is required")
    field = "response_format.json_schema.schema"
    return [GivenConstraint(field, {"json": given.json_schema.schema})]
