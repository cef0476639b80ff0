"""Hermes and Qwen 2.5, 3: each call is JSON between two tags.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Source: the chat templates of NousResearch/Hermes-2-Pro and Qwen/Qwen3, "hermes" in vLLM's
documentation of tool calling. Granite 4, SmolLM 3 and many others write the same.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.json_calls import JsonCalls, calls_in
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_OPENING = "<tool_call>"
_CLOSING = "</tool_call>"
_MARKERS = Markers(_OPENING)
_CLOSINGS = Words([_CLOSING])


def _read(tools: Sequence[ToolSchema]) -> Read:
    calls = JsonCalls(tools, may_omit_arguments=True)

    def call(reader: Reader, _marker: str) -> Reading[None]:
        yield from reader.spaces()
        yield from calls.one_or_list(reader)
        yield from reader.spaces()
        yield from reader.expect(_CLOSINGS)
        yield from reader.marker_ends()

    return lambda reader: calls_in(reader, _MARKERS, call)


HERMES = CallDialect(
    name="hermes",
    read=_read,
    form=CallForm(
        before_name='<tool_call>\n{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}\n</tool_call>",
        separator="\n",
    ),
    markers=(_OPENING, _CLOSING),
    aliases=("granite4",),
)
