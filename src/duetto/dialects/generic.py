"""JSON for models of no known family: an object or a list of them, also in a fence.

    {"name": "get_weather", "arguments": {"city": "Paris"}}

    ```json
    [{"name": "get_weather", "arguments": {"city": "Paris"}}]
    ```

What models write when a prompt asks them for calls in JSON. A call begins a line.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.json_calls import JsonCalls, calls_in
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_FENCE = "```json"
_MARKERS = Markers(at_line_start=[_FENCE, "{", "["])
_FENCE_END = Words(["```"])


def _read(tools: Sequence[ToolSchema]) -> Read:
    calls = JsonCalls(tools, may_omit_arguments=False)

    def behind(reader: Reader, marker: str) -> Reading[None]:
        if marker == "{":
            yield from calls.object_on(reader)
        elif marker == "[":
            yield from calls.list_on(reader)
        else:
            yield from reader.spaces()
            yield from calls.one_or_list(reader)
            yield from reader.spaces()
            yield from reader.expect(_FENCE_END)
        yield from reader.marker_ends()

    return lambda reader: calls_in(reader, _MARKERS, behind)


GENERIC = CallDialect(
    name="json",
    read=_read,
    form=CallForm(
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator="\n",
    ),
    markers=(),
    aliases=("generic",),
    begins_line=True,
)
