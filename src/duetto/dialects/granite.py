"""IBM Granite 3 and 4, Granite 20B function calling.

    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]      3.0
    <tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]        3.1 and later
    <function_call> {"name": "get_weather", "arguments": {"city": "Paris"}}     20B

Source: the chat templates of ibm-granite, "granite" and "granite-20b-fc" in vLLM's documentation of
tool calling. A closing tag may follow.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.json_calls import JsonCalls, calls_in
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_OPENINGS = ("<|tool_call|>", "<tool_call>", "<function_call>")
_CLOSINGS = ("</tool_call>", "<|/tool_call|>", "</function_call>")
_MARKERS = Markers(*_OPENINGS)
_CLOSING_WORDS = Words(_CLOSINGS)


def _read(tools: Sequence[ToolSchema]) -> Read:
    calls = JsonCalls(tools, may_omit_arguments=True)

    def behind(reader: Reader, _marker: str) -> Reading[None]:
        yield from reader.spaces()
        yield from calls.one_or_list(reader)
        yield from reader.marker_ends()
        if (yield from reader.peek()) == "<":
            yield from reader.expect(_CLOSING_WORDS)
            yield from reader.marker_ends()

    return lambda reader: calls_in(reader, _MARKERS, behind)


GRANITE = CallDialect(
    name="granite",
    read=_read,
    form=CallForm(
        opening="<|tool_call|>[",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        closing="]",
    ),
    markers=(*_OPENINGS, *_CLOSINGS),
    aliases=("granite-20b-fc",),
)
