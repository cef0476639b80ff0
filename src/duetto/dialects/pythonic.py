"""Llama 3.2 and 4, ToolACE, Gemma 3 by its guide: calls as Python writes them, in a list.

    [get_weather(city="Paris", days=2), get(a={"b": [1, None]})]

Source: Meta's prompt formats for Llama 3.2 and 4 (Llama 4 may put the list between
`<|python_start|>` and `<|python_end|>`), "pythonic" and "llama4_pythonic" in vLLM's documentation
of tool calling. The list begins a line. A call is one when its `)` has come and all its arguments
are named literals; nothing is evaluated.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import ArgumentForm, CallDialect, CallForm
from duetto.dialects.json_calls import calls_in
from duetto.dialects.literals import PYTHON, NotALiteral, object_to_json
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import CutOff, NotACall, Reader, Reading, nothing_before
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_START, _END, _TAG = "<|python_start|>", "<|python_end|>", "<|python_tag|>"
_MARKERS = Markers(_START, _TAG, at_line_start=["["])
_LIST = Words(["["])
_LIST_GOES_ON = Words([",", "]"])
_ENDS = Words([_END])
_OPENING_BRACKET = Words(["("])
_STRUCTURE = Markers("(", ")", "[", "]", "{", "}", '"', "'")
_IN_STRING = {quote: Markers(quote, "\\") for quote in "\"'"}


class PythonCalls:
    """Reads calls of some tools as Python writes them."""

    def __init__(self, tools: Sequence[ToolSchema]) -> None:
        self._names = Words(tool.name for tool in tools)

    def list_on(self, reader: Reader) -> Reading[None]:
        """Calls behind their `[`."""
        while True:
            yield from reader.spaces()
            yield from self.call(reader)
            yield from reader.spaces()
            if (yield from reader.expect(_LIST_GOES_ON)) == "]":
                yield from reader.marker_ends()
                return
            reader.expect_call()

    def call(self, reader: Reader) -> Reading[None]:
        name = yield from reader.expect(self._names)
        yield from reader.expect(_OPENING_BRACKET)
        source = yield from _to_closing_bracket(reader)
        try:
            arguments = object_to_json(source, PYTHON, "=")
        except NotALiteral:
            raise NotACall from None
        reader.whole_call(name, arguments)


def _to_closing_bracket(reader: Reader) -> Reading[str]:
    """The text up to the `)` that closes the call; all of it is held."""
    parts: list[str] = []

    def hold(text: str) -> None:
        parts.append(text)
        reader.hold(text)

    depth = 1
    while True:
        mark = yield from reader.value_until(_STRUCTURE, hold, nothing_before)
        if mark is None:
            raise CutOff
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
            if depth == 0:
                return "".join(parts)
        parts.append(mark)
        if mark in _IN_STRING:
            yield from _string_on(reader, mark, parts)


def _string_on(reader: Reader, quote: str, parts: list[str]) -> Reading[None]:
    """A string behind its opening quote."""

    def hold(text: str) -> None:
        parts.append(text)
        reader.hold(text)

    while True:
        mark = yield from reader.value_until(_IN_STRING[quote], hold, nothing_before)
        if mark is None:
            raise CutOff
        parts.append(mark)
        if mark == quote:
            return
        if not (yield from reader.peek()):
            raise CutOff
        parts.append(reader.next())


def _read(tools: Sequence[ToolSchema]) -> Read:
    calls = PythonCalls(tools)

    def behind(reader: Reader, marker: str) -> Reading[None]:
        if marker != "[":
            yield from reader.spaces()
            yield from reader.expect(_LIST)
        yield from calls.list_on(reader)
        if marker == _START:
            yield from reader.expect(_ENDS)
            yield from reader.marker_ends()

    return lambda reader: calls_in(reader, _MARKERS, behind)


PYTHONIC = CallDialect(
    name="pythonic",
    read=_read,
    form=CallForm(
        opening="[",
        before_name="",
        before_arguments="(",
        after_arguments=")",
        separator=", ",
        closing="]",
        arguments=ArgumentForm(before_key="", after_key="=", after_value="", separator=", "),
    ),
    markers=(_START, _END, _TAG),
    aliases=("llama4_pythonic",),
    begins_line=True,
)
