"""Llama 3.1 to 3.3, and 4 where it writes JSON: an object, its arguments called parameters.

    {"name": "get_weather", "parameters": {"city": "Paris"}}
    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ...}
    <|python_start|>{"name": "get_weather", "parameters": {"city": "Paris"}}<|python_end|>

Source: Meta's prompt formats and the chat templates of meta-llama, "llama3_json" in vLLM's
documentation of tool calling. Without a tag a call begins a line.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.json_calls import JsonCalls, calls_in
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_TAG, _START, _END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"
_MARKERS = Markers(_TAG, _START, at_line_start=["{"])
_ENDS = Words([_END])
_OBJECT = Words(["{"])
_SEPARATORS = Words([";", ","])


def _read(tools: Sequence[ToolSchema]) -> Read:
    calls = JsonCalls(tools, may_omit_arguments=False)

    def behind(reader: Reader, marker: str) -> Reading[None]:
        if marker != "{":
            yield from reader.spaces()
            yield from reader.expect(_OBJECT)
        while True:
            yield from calls.object_on(reader)
            yield from reader.marker_ends()
            if (yield from reader.literal(_SEPARATORS)) is None:
                break
            reader.expect_call()
            yield from reader.spaces()
            yield from reader.expect(_OBJECT)
        if marker == _START:
            yield from reader.expect(_ENDS)
            yield from reader.marker_ends()

    return lambda reader: calls_in(reader, _MARKERS, behind)


LLAMA_JSON = CallDialect(
    name="llama3_json",
    read=_read,
    form=CallForm(
        before_name='{"name": "',
        before_arguments='", "parameters": ',
        after_arguments="}",
        separator="; ",
    ),
    markers=(_TAG, _START, _END),
    aliases=("llama4_json",),
    begins_line=True,
)
