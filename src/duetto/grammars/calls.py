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

_DEFINITIONS = ("$defs", "definitions")
_MOST_STEPS = 64  # through references and alternatives: a schema may lead in circles


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
        if not form.string_quote and (leaves := _strings(schema, tool.parameters)):
            texts = _texts(leaves)
            if texts is None:
                # Its reader ends it also where no line ends before.
                marker = form.after_value.strip()
                _, _, rest = form.after_value.partition(marker)
                return f"{before} {lark.until(marker)} {lark.literal(rest)}"
            one = lark.one_of([lark.literal(text) for text in texts])
            return f"{before} {one} {lark.literal(form.after_value)}"
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
    others = schema.get("additionalProperties", {})
    properties = {**properties, **{name: others for name in required if name not in properties}}
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


def _strings(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a schema allows, without alternatives and references; nothing if no string is."""
    found, waiting = list[Mapping[str, Any]](), [schema]
    for _ in range(_MOST_STEPS):
        if not waiting:
            break
        each = waiting.pop()
        lists = [each.get(key) for key in ("anyOf", "oneOf", "allOf")]
        inner = [one for given in lists if isinstance(given, list) for one in given]
        if (reference := each.get("$ref")) is not None:
            inner.append(_referred(reference, root))
        waiting += [one for one in inner if isinstance(one, Mapping)]
        if not inner:
            found.append(each)
    return found if any("string" in _types(leaf) for leaf in found) else []


def _texts(leaves: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """How strings without quotes, and null, are written; None for any text."""
    texts = list[str]()
    for leaf in leaves:
        choices, types = _choices(leaf), _types(leaf)
        if "string" in types and choices is None:
            return None
        texts += choices or ()
        texts += ["null"] if "null" in types else ()
    return list(dict.fromkeys(texts))


def _types(leaf: Mapping[str, Any]) -> set[str]:
    """Whether it may be a string or null: where nothing is said, it is a string."""
    named, values = leaf.get("type"), leaf.get("enum", [leaf["const"]] if "const" in leaf else None)
    if isinstance(values, list):
        names = {str: "string", type(None): "null"}
        return {names.get(type(value), "other") for value in values}
    return {*map(str, named)} if isinstance(named, list) else {str(named or "string")}


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    at: Any = root
    for part in str(reference).removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        at = at.get(name) if isinstance(at, Mapping) else None
    return at


def _definitions(tool: CallableTool) -> dict[str, Any]:
    return {name: tool.parameters[name] for name in _DEFINITIONS if name in tool.parameters}
