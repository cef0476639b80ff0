"""Phi-4-mini: a list of JSON objects.

    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>
    functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]

Source: the model card and chat template of microsoft/Phi-4-mini-instruct for the first,
"phi4_mini_json" in vLLM's documentation of tool calling and its template for the second.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.json_calls import JsonCalls, calls_in
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_OPENING, _CLOSING, _WORD = "<|tool_call|>", "<|/tool_call|>", "functools"
_MARKERS = Markers(_OPENING, _WORD)
_LIST = Words(["["])
_CLOSINGS = Words([_CLOSING])


def _read(tools: Sequence[ToolSchema]) -> Read:
    calls = JsonCalls(tools, may_omit_arguments=True)

    def behind(reader: Reader, _marker: str) -> Reading[None]:
        yield from reader.spaces()
        yield from reader.expect(_LIST)
        yield from calls.list_on(reader)
        yield from reader.marker_ends()
        if (yield from reader.peek()) == "<":
            yield from reader.expect(_CLOSINGS)
            yield from reader.marker_ends()

    return lambda reader: calls_in(reader, _MARKERS, behind)


PHI = CallDialect(
    name="phi4_mini_json",
    read=_read,
    form=CallForm(
        opening="<|tool_call|>[",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        closing="]<|/tool_call|>",
    ),
    markers=(_OPENING, _CLOSING),
    aliases=("phi4",),
)
