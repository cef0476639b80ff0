"""The grammar of an answer that calls tools, in the form in which a dialect writes calls.

Knows no library: it is told in expressions of a LarkWriter.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from duetto.dialects.dialect import ArgumentForm, CallForm
from duetto.dialects.pieces import ToolSchema
from duetto.grammars.lark import LarkWriter
from duetto.grammars.tags import (
    ReasoningMarks,
    Tag,
    free_until_tag,
    json_content,
    reasoning_first,
)

ANY_ARGUMENTS = {"type": "object"}


def call_grammar(
    lark: LarkWriter,
    form: CallForm,
    tools: Sequence[ToolSchema],
    *,
    is_required: bool,
    parallel: bool,
    reasoning: ReasoningMarks | None = None,
    instead: str | None = None,
) -> str:
    """Calls and nothing else if they are required; else free text until one begins, which is then
    written to its end; or, with the text of a schema `instead`, either calls or JSON by it. Raises
    InvalidRequest for a schema that is not supported."""
    several = parallel and form.separator is not None
    one = lark.rule(lark.one_of([_call(lark, form, tool) for tool in tools]))
    if is_required or instead is not None:
        expression = f"{_literal(lark, form.opening + form.before_name)} {one}"
        if several:
            again = _literal(lark, f"{form.separator}{form.before_name}")
            expression += f" ({again} {one})*"
        expression += _ending(lark, form)
        if instead is not None and not is_required:
            output = json_content(lark, json.loads(instead), "structured_outputs.json")
            expression = lark.one_of([lark.rule(expression), output])
    elif form.opening:
        rest = f"{_literal(lark, form.before_name)} {one}"
        if several:
            rest += f" ({_literal(lark, f'{form.separator}{form.before_name}')} {one})*"
        tag = Tag(form.opening, rest + _ending(lark, form))
        expression = free_until_tag(lark, [tag], only_one=True)
    else:
        tag = Tag(form.before_name, one)
        expression = free_until_tag(lark, [tag], only_one=not several)
    return expression if reasoning is None else reasoning_first(lark, reasoning, expression)


def _call(lark: LarkWriter, form: CallForm, tool: ToolSchema) -> str:
    """From the name on."""
    named = _literal(lark, tool.name + form.before_arguments)
    schema = tool.parameters or ANY_ARGUMENTS
    if form.arguments is None:
        arguments = json_content(lark, _as_object(schema), "tools")
    else:
        arguments = _arguments(lark, form.arguments, schema)
    return lark.rule(f"{named} {arguments} {_literal(lark, form.after_arguments)}")


def _arguments(lark: LarkWriter, form: ArgumentForm, schema: Mapping[str, Any]) -> str:
    """Keys in the order of the schema; those that it does not require may be left out."""
    properties = schema.get("properties") or {}
    required = set(schema.get("required") or ())
    # From the last property to the first: what may follow, at the beginning and behind a value.
    first, later = '""', '""'
    for name, inner in reversed(properties.items()):
        own = _argument(lark, form, name, inner if isinstance(inner, Mapping) else {})
        begun = lark.rule(f"{_literal(lark, form.separator)} {own} {later}")
        fresh = lark.rule(f"{own} {later}")
        if name in required:
            first, later = fresh, begun
        else:
            first = lark.one_of([fresh, first])
            later = lark.one_of([begun, later])
    return first


def _argument(lark: LarkWriter, form: ArgumentForm, name: str, schema: Mapping[str, Any]) -> str:
    key = _literal(lark, form.before_key + name + form.after_key)
    if schema.get("type") == "string" and not form.string_quote and "enum" not in schema:
        return f"{key} {lark.until(form.after_value)}"
    if schema.get("type") == "string" and "enum" in schema and not form.string_quote:
        values = [_literal(lark, str(each)) for each in schema["enum"]]
        return f"{key} {lark.one_of(values)} {_literal(lark, form.after_value)}"
    value = json_content(lark, schema, "tools")
    return f"{key} {value} {_literal(lark, form.after_value)}"


def _as_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments are an object, also where a schema forgets to say so."""
    return schema if "type" in schema or "$ref" in schema else {**schema, "type": "object"}


def _ending(lark: LarkWriter, form: CallForm) -> str:
    return f" {_literal(lark, form.closing)}" if form.closing else ""


def _literal(lark: LarkWriter, text: str) -> str:
    return lark.literal(text) if text else '""'


def schema_text(schema: Mapping[str, Any]) -> str:
    return json.dumps(_as_object(schema), ensure_ascii=False)
