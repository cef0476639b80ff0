"""Calls of tools as a dialect writes them: among free text, or as the whole of an answer.

    opening, (before_name, name, before_arguments, arguments, after_arguments) ..., closing

Knows no dialect: a form of this shape is handed in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from duetto.core.errors import InvalidRequest
from duetto.grammars.json_schema import JsonOptions
from duetto.grammars.lark import LarkWriter, quoted
from duetto.grammars.tags import Tag, free_until_tag, json_content, only_tags


class WrittenArguments(Protocol):
    """Arguments that are not JSON: keys and values in turn. Values are JSON, but for strings."""

    @property
    def before_key(self) -> str: ...
    @property
    def after_key(self) -> str: ...
    @property
    def after_value(self) -> str: ...
    @property
    def separator(self) -> str: ...
    @property
    def string_quote(self) -> str:
        """What stands around a string; "" for one that ends where `after_value` begins."""
        ...

    @property
    def quotes_inner_strings(self) -> bool:
        """Whether strings within lists and objects have that quote too, and keys there none."""
        ...


class WrittenCalls(Protocol):
    @property
    def before_name(self) -> str: ...
    @property
    def before_arguments(self) -> str: ...
    @property
    def after_arguments(self) -> str: ...
    @property
    def opening(self) -> str: ...
    @property
    def closing(self) -> str: ...
    @property
    def separator(self) -> str | None:
        """Between two calls; None where only one may be made."""
        ...

    @property
    def arguments(self) -> WrittenArguments | None:
        """None: JSON."""
        ...


class CallableTool(NamedTuple):
    name: str
    parameters: Mapping[str, Any]  # a schema
    field: str = "tools"  # where a caller has it


def calls_among_text(
    lark: LarkWriter,
    form: WrittenCalls,
    tools: Sequence[CallableTool],
    triggers: Sequence[str] = (),
    *,
    parallel: bool = True,
    last: str | None = None,
) -> str:
    """Free text, until a call begins with one of `triggers` (by default, with all that stands
    before a name): then it goes on as one. `last` is what may stand behind calls, or without
    them; by default any text."""
    several = parallel and form.separator is not None
    if form.opening:
        tags = [Tag(form.opening, _calls(lark, form, tools, several=several), form.closing)]
    else:
        tags = [_call(lark, form, tool) for tool in tools]
    begins = triggers or [form.opening or form.before_name]
    return free_until_tag(lark, tags, begins, only_one=not several, last=last)


def calls_alone(
    lark: LarkWriter,
    form: WrittenCalls,
    tools: Sequence[CallableTool],
    *,
    parallel: bool = True,
) -> str:
    """One call or more, and nothing else."""
    several = parallel and form.separator is not None
    calls = _calls(lark, form, tools, several=several)
    return " ".join([lark.literal(form.opening), calls, lark.literal(form.closing)])


def _calls(
    lark: LarkWriter, form: WrittenCalls, tools: Sequence[CallableTool], *, several: bool
) -> str:
    tags = [_call(lark, form, tool) for tool in tools]
    return lark.rule(only_tags(lark, tags, form.separator or "", only_one=not several))


def _call(lark: LarkWriter, form: WrittenCalls, tool: CallableTool) -> Tag:
    begin = form.before_name + tool.name + form.before_arguments
    if form.arguments is None:
        schema = {"type": "object", **tool.parameters}
        content = json_content(lark, schema, tool.field, JsonOptions())
    else:
        content = _arguments(lark, form.arguments, tool)
    return Tag(begin, content, form.after_arguments)


def _arguments(lark: LarkWriter, form: WrittenArguments, tool: CallableTool) -> str:
    """Those that the schema names, in its order, each once."""

    def member(name: str, schema: Mapping[str, Any]) -> str:
        before = lark.literal(f"{form.before_key}{name}{form.after_key}")
        if schema.get("type") == "string" and not form.string_quote and not _choices(schema):
            return f"{before} {lark.until(form.after_value)}"
        value = _value(lark, form, tool, {**_definitions(tool), **schema})
        return f"{before} {value} {lark.literal(form.after_value)}"

    return _members(lark, tool.parameters, tool.field, form.separator, member)


def _members(
    lark: LarkWriter,
    schema: Mapping[str, Any],
    field: str,
    separator: str,
    member: Callable[[str, Mapping[str, Any]], str],
) -> str:
    """The properties of an object in their order: those that are required, and any of the rest."""
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if not isinstance(properties, Mapping):
        raise InvalidRequest(field, "properties must be an object")
    # From the last to the first: what follows depends on whether anything stands before it.
    first, later = '""', '""'
    for name, given in reversed([*properties.items()]):
        own = given if isinstance(given, Mapping) else {}
        behind = lark.rule(f"{member(name, own)} {later}")
        joined = f"{lark.literal(separator)} {behind}" if separator else behind
        if name in required:
            first, later = behind, lark.rule(joined)
        else:
            first, later = lark.rule(f"{behind} | {first}"), lark.rule(f"{joined} | {later}")
    return first


def _value(
    lark: LarkWriter, form: WrittenArguments, tool: CallableTool, schema: Mapping[str, Any]
) -> str:
    kind, quote = schema.get("type"), form.string_quote
    if quote == '"' or not (kind == "string" or form.quotes_inner_strings):
        return json_content(lark, schema, tool.field)
    around = lark.literal(quote)
    if kind == "string":
        if (texts := _choices(schema)) is not None:
            return f"{around} {lark.one_of([lark.literal(text) for text in texts])} {around}"
        return f"{around} {lark.until(quote)}"
    if kind == "array":
        items = schema.get("items")
        own = items if isinstance(items, Mapping) else {"type": "string"}
        item = lark.rule(_value(lark, form, tool, {**_definitions(tool), **own}))
        return lark.rule(f'"[" ({item} ("," {item})*)? "]"')
    if kind == "object" and "properties" in schema:

        def member(name: str, given: Mapping[str, Any]) -> str:
            value = _value(lark, form, tool, {**_definitions(tool), **given})
            return f"{quoted(name + ':')} {value}"

        return lark.rule(f'"{{" {_members(lark, schema, tool.field, ",", member)} "}}"')
    return json_content(lark, schema, tool.field)


def _choices(schema: Mapping[str, Any]) -> list[str] | None:
    """The texts that a string is one of, where it is."""
    given = schema.get("enum", [schema["const"]] if "const" in schema else None)
    texts = [text for text in given if isinstance(text, str)] if isinstance(given, list) else []
    return texts or None


def _definitions(tool: CallableTool) -> dict[str, Any]:
    return {"$defs": tool.parameters["$defs"]} if "$defs" in tool.parameters else {}
