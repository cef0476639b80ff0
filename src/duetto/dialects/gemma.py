"""Gemma's forms: FunctionGemma, Gemma 4, and Python in a fence of `tool_code`.

    <start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>
    <|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>

    ```tool_code
    get_weather(city="Paris", days=2)
    ```

Sources: ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices, Google's guides to
function calling with Gemma 3 and Gemma 4, and their chat templates. Keys are bare; a string that is
not delimited is taken as one, too. A call is one when its closing bracket has come.
"""

import json
import re
from collections.abc import Sequence

from duetto.dialects.dialect import ArgumentForm, CallDialect, CallForm
from duetto.dialects.json_calls import calls_in
from duetto.dialects.literals import NotALiteral, Notation, object_to_json
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.pythonic import PythonCalls
from duetto.dialects.reader import CutOff, NotACall, Reader, Reading, nothing_before
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_CALL = Words(["call:"])
_OBJECT = Words(["{"])
_JSON_QUOTE = '"'
_JSON_END = Markers(_JSON_QUOTE)


def _notation(quote: str) -> Notation:
    def unquoted(token: str) -> str:
        if token.startswith('"'):
            return _json_string(token)
        return token[len(quote) : -len(quote)]

    delimiter = re.escape(quote)
    return Notation(
        token=re.compile(
            rf'(?:(?P<string>{delimiter}[\s\S]*?{delimiter}|"[^"\\]*(?:\\[\s\S][^"\\]*)*")'
            r'|(?P<word>[^][{},:<"\s][^][{},:<"]*)|(?P<mark>[][{},:]))\s*'
        ),
        unquoted=unquoted,
        has_bare_strings=True,
    )


def _json_string(token: str) -> str:
    try:
        return str(json.loads(token, strict=False))
    except ValueError:
        raise NotALiteral(token) from None


def _object_on(reader: Reader, structure: Markers, end: Markers, quote: str) -> Reading[str]:
    """An object behind its `{`, without its `}`; all of it is held."""
    parts: list[str] = []

    def hold(text: str) -> None:
        parts.append(text)
        reader.hold(text)

    depth = 1
    while True:
        mark = yield from reader.value_until(structure, hold, nothing_before)
        if mark is None:
            raise CutOff
        if mark == "{":
            depth += 1
        elif mark == "}":
            depth -= 1
            if depth == 0:
                return "".join(parts)
        parts.append(mark)
        if mark == _JSON_QUOTE:
            # A bracket in a JSON string opens and closes nothing.
            is_escaped = True
            while is_escaped:
                at = len(parts)
                if (yield from reader.value_until(_JSON_END, hold, nothing_before)) is None:
                    raise CutOff
                text = "".join(parts[at:])
                is_escaped = (len(text) - len(text.rstrip("\\"))) % 2 == 1
                parts.append(mark)
        if mark == quote:
            if (yield from reader.value_until(end, hold, nothing_before)) is None:
                raise CutOff
            parts.append(quote)


def _bracketed(name: str, opening: str, closing: str, quote: str) -> CallDialect:
    """`call:` and a name between two markers, with an object whose strings have a delimiter."""
    notation = _notation(quote)
    structure, string_end = Markers("{", "}", quote, _JSON_QUOTE), Markers(quote)
    closings = Words([closing])
    openings = Markers(opening)

    def read(tools: Sequence[ToolSchema]) -> Read:
        names = Words(tool.name for tool in tools)

        def call(reader: Reader, _marker: str) -> Reading[None]:
            yield from reader.spaces()
            yield from reader.expect(_CALL)
            tool = yield from reader.expect(names)
            yield from reader.expect(_OBJECT)
            source = yield from _object_on(reader, structure, string_end, quote)
            try:
                arguments = object_to_json(source, notation, ":")
            except NotALiteral:
                raise NotACall from None
            reader.whole_call(tool, arguments)
            yield from reader.spaces()
            yield from reader.expect(closings)
            yield from reader.marker_ends()

        return lambda reader: calls_in(reader, openings, call)

    return CallDialect(
        name=name,
        read=read,
        form=CallForm(
            before_name=f"{opening}call:",
            before_arguments="{",
            after_arguments="}" + closing,
            separator="",
            arguments=ArgumentForm(
                before_key="", after_key=":", after_value="", separator=",", string_quote=quote
            ),
        ),
        markers=(opening, closing, quote),
    )


FUNCTION_GEMMA = _bracketed(
    "functiongemma", "<start_function_call>", "<end_function_call>", "<escape>"
)
GEMMA_4 = _bracketed("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>')

_FENCE = "```tool_code"
_FENCES = Markers(at_line_start=[_FENCE])
_FENCE_END = Words(["```"])
_LIST = Words(["["])


def _read_tool_code(tools: Sequence[ToolSchema]) -> Read:
    calls = PythonCalls(tools)

    def fence(reader: Reader, _marker: str) -> Reading[None]:
        yield from reader.spaces()
        if (yield from reader.literal(_LIST)) is not None:
            yield from calls.list_on(reader)
            yield from reader.expect(_FENCE_END)
            yield from reader.marker_ends()
            return
        while True:
            yield from calls.call(reader)
            yield from reader.spaces()
            if (yield from reader.peek()) in ("`", ""):
                yield from reader.expect(_FENCE_END)
                yield from reader.marker_ends()
                return
            reader.expect_call()

    return lambda reader: calls_in(reader, _FENCES, fence)


TOOL_CODE = CallDialect(
    name="tool_code",
    read=_read_tool_code,
    form=CallForm(
        opening="```tool_code\n",
        before_name="",
        before_arguments="(",
        after_arguments=")\n",
        separator="",
        closing="```",
        arguments=ArgumentForm(before_key="", after_key="=", after_value="", separator=", "),
    ),
    markers=(),
)
