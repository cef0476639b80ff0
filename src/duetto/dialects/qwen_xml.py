"""Qwen 3 Coder, Seed-OSS: tags with the names of function and parameters; values without quotes.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Source: the chat templates of Qwen/Qwen3-Coder and ByteDance-Seed/Seed-OSS (whose outer tag is
`<seed:tool_call>`, with no line breaks around values), "qwen3_coder" and "seed_oss" in vLLM's
documentation of tool calling. The outer tag may be missing. Qwen's line break behind and before
a value's tags is not part of it. Types are those of the tool's schema; a string is handed on as it
comes, and ends at the first `</parameter>`.
"""

import json
from collections.abc import Sequence

from duetto.dialects.dialect import ArgumentForm, CallDialect, CallForm
from duetto.dialects.json_calls import calls_in
from duetto.dialects.literals import string_to_json
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import CutOff, Kept, Reader, Reading, newline_before, nothing_before
from duetto.dialects.schema_types import parameter_types, typed_json
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_FUNCTION = "<function="
_PARAMETER, _FUNCTION_END, _PARAMETER_END = "<parameter=", "</function>", "</parameter>"
_FUNCTION_WORDS = Words([_FUNCTION])
_BODY = Words([_PARAMETER, _FUNCTION_END])
_NAME_ENDS = Words([">"])
_KEY_END = Markers(">")
_VALUE_END = Markers(_PARAMETER_END)
_LINE_END = Words(["\n"])
_MOST_KEY = 256


def _function(
    reader: Reader, tools: dict[str, ToolSchema], names: Words, line: str
) -> Reading[None]:
    """A function behind `<function=`, up to its end. `line` is around values, no part of them."""
    name = yield from reader.expect(names)
    yield from reader.expect(_NAME_ENDS)
    reader.start_call(name)
    yield from reader.spaces()
    keys = 0
    while (yield from reader.expect(_BODY)) == _PARAMETER:
        key, _ = yield from reader.upto(_KEY_END, _MOST_KEY)
        if line:
            yield from reader.literal(_LINE_END)
        reader.commit()
        reader.arguments(f"{', ' if keys else '{'}{string_to_json(key)}: ")
        keys += 1
        types = parameter_types(tools[name].parameters, key)
        yield from _value(reader, types, newline_before if line else nothing_before)
        yield from reader.marker_ends()
    reader.arguments("}" if keys else "{}")
    reader.end_call()


def _value(reader: Reader, types: frozenset[str], kept: Kept) -> Reading[None]:
    parts: list[str] = []
    if types == {"string"}:
        reader.arguments('"')
        end = yield from reader.value_until(
            _VALUE_END,
            lambda text: reader.arguments(json.dumps(text, ensure_ascii=False)[1:-1]),
            kept,
        )
        tail = '"'
    else:
        end = yield from reader.value_until(_VALUE_END, parts.append, kept)
        tail = typed_json("".join(parts), types)
    if end is None:
        if parts:
            reader.arguments("".join(parts))  # cut off: nothing is lost, and it is not complete
        raise CutOff
    reader.arguments(tail)


def _dialect(name: str, tag: str, line: str, aliases: tuple[str, ...]) -> CallDialect:
    opening, closing = f"<{tag}>", f"</{tag}>"
    markers = Markers(opening, _FUNCTION)
    outer = Words([_FUNCTION, closing])
    closings = Words([closing])

    def read(tools: Sequence[ToolSchema]) -> Read:
        by_name = {tool.name: tool for tool in tools}
        names = Words(by_name)

        def call(reader: Reader, marker: str) -> Reading[None]:
            if marker == _FUNCTION:
                yield from _function(reader, by_name, names, line)
                yield from reader.marker_ends()
                if (yield from reader.peek()) == "<":
                    yield from reader.literal(closings)
                    yield from reader.marker_ends()
                return
            yield from reader.spaces()
            yield from reader.expect(_FUNCTION_WORDS)
            while True:
                yield from _function(reader, by_name, names, line)
                yield from reader.marker_ends()
                if (yield from reader.expect(outer)) == closing:
                    break
                reader.expect_call()
            yield from reader.marker_ends()

        return lambda reader: calls_in(reader, markers, call)

    return CallDialect(
        name=name,
        read=read,
        form=CallForm(
            before_name=f"{opening}\n{_FUNCTION}",
            before_arguments=">\n",
            after_arguments=f"{_FUNCTION_END}\n{closing}",
            separator="\n",
            arguments=ArgumentForm(
                before_key=_PARAMETER,
                after_key=f">{line}",
                after_value=f"{line}{_PARAMETER_END}\n",
                separator="",
                string_quote="",
                quotes_inner_strings=False,
            ),
        ),
        markers=(opening, closing),
        aliases=aliases,
    )


QWEN_XML = _dialect("qwen3_coder", "tool_call", "\n", ("qwen3_xml", "mimo"))
SEED_XML = _dialect("seed_oss", "seed:tool_call", "", ())
