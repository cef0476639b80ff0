"""Mistral: a marker, then a list of JSON objects, or a name and its arguments.

    [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "aB3dE6gH9"}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}
    [TOOL_CALLS]get_weather[CALL_ID]aB3dE6gH9[ARGS]{"city": "Paris"}

Source: the chat templates of mistralai (the list: up to tokenizer v7; the name: from v11 on),
mistral-common, "mistral" in vLLM's documentation of tool calling.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.json_calls import JsonCalls, calls_in
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_CALLS, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_MARKERS = Markers(_CALLS)
_BEHIND_NAME = Words([_ID, _ARGUMENTS])
_BEHIND_ID = Markers(_ARGUMENTS)
_MOST_ID = 64


def _read(tools: Sequence[ToolSchema]) -> Read:
    calls = JsonCalls(tools, may_omit_arguments=True)
    names = Words(tool.name for tool in tools)

    def behind(reader: Reader, _marker: str) -> Reading[None]:
        yield from reader.spaces()
        if (yield from reader.peek()) in ("[", "{"):
            yield from calls.one_or_list(reader)
        else:
            name = yield from reader.expect(names)
            yield from reader.spaces()
            if (yield from reader.literal(_BEHIND_NAME)) == _ID:
                yield from reader.upto(_BEHIND_ID, _MOST_ID)
            yield from reader.spaces()
            yield from reader.json_arguments(name)
        yield from reader.marker_ends()

    return lambda reader: calls_in(reader, _MARKERS, behind)


_WITH_NAMES = CallForm(
    before_name="[TOOL_CALLS]", before_arguments="[ARGS]", after_arguments="", separator=""
)
_WITH_LIST = CallForm(
    opening="[TOOL_CALLS] [",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}",
    separator=", ",
    closing="]",
)
# Both read either form; what a grammar writes is the form that the model was trained for.
MISTRAL = CallDialect(
    name="mistral", read=_read, form=_WITH_NAMES, markers=(_CALLS, _ID, _ARGUMENTS)
)
MISTRAL_LIST = CallDialect(
    name="mistral_list", read=_read, form=_WITH_LIST, markers=(_CALLS, _ID, _ARGUMENTS)
)
