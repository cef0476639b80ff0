"""Calls that are JSON objects: `{"name": ..., "arguments": {...}}`, alone or in a list."""

import json
from collections.abc import Callable, Mapping, Sequence

from duetto.dialects.pieces import Content, ToolSchema
from duetto.dialects.reader import NotACall, Reader, Reading
from duetto.dialects.words import Markers, Words

CallReader = Callable[[Reader, str], Reading[None]]  # reads on behind an opening marker

_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("id", "type", "call_id")  # what a call may have besides, and a parser need not know
_KEYS = Words(f'"{key}"' for key in (_NAME, *_ARGUMENTS, *_OTHERS))
_COLON = Words([":"])
_QUOTE = Words(['"'])
_STRING_END = Markers('"')
_OBJECT_GOES_ON = Words([",", "}"])
_LIST_GOES_ON = Words([",", "]"])
_OBJECT = Words(["{"])
_OBJECT_OR_LIST = Words(["{", "["])
_MOST_SCALAR = 256  # characters of the value of another key


def calls_in(reader: Reader, markers: Markers, read: CallReader) -> Reading[None]:
    """An answer that is content and, behind markers, calls."""
    while (marker := (yield from reader.text_until(markers, Content))) is not None:
        try:
            yield from read(reader, marker)
        except NotACall as why:
            reader.give_back(why)


class JsonCalls:
    """Reads calls of some tools from JSON."""

    def __init__(self, tools: Sequence[ToolSchema], *, may_omit_arguments: bool) -> None:
        """`may_omit_arguments`: a name alone is a call, as a marker has said that one comes."""
        self._names = _quoted({tool.name for tool in tools})
        self._name_words = Words(self._names)
        self._may_omit_arguments = may_omit_arguments

    def one_or_list(self, reader: Reader) -> Reading[None]:
        """What begins with `{` or `[`."""
        if (yield from reader.expect(_OBJECT_OR_LIST)) == "[":
            yield from self.list_on(reader)
        else:
            yield from self.object_on(reader)

    def list_on(self, reader: Reader) -> Reading[None]:
        """A list of calls, behind its `[`."""
        while True:
            yield from reader.spaces()
            yield from reader.expect(_OBJECT)
            yield from self.object_on(reader)
            yield from reader.spaces()
            if (yield from reader.expect(_LIST_GOES_ON)) == "]":
                reader.commit()
                return
            reader.expect_call()

    def object_on(self, reader: Reader) -> Reading[None]:
        """A call, behind its `{`. The keys may come in any order."""
        name: str | None = None
        early: list[str] = []  # arguments that came before the name
        has_arguments = False
        while True:
            yield from reader.spaces()
            key = (yield from reader.expect(_KEYS)).strip('"')
            yield from reader.spaces()
            yield from reader.expect(_COLON)
            yield from reader.spaces()
            if key == _NAME and name is None:
                name = self._names[(yield from reader.expect(self._name_words))]
            elif key in _ARGUMENTS and not has_arguments:
                has_arguments = True
                if name is None:
                    yield from _hold_object(reader, early)
                else:
                    yield from reader.json_arguments(name)
            elif key in _OTHERS:
                yield from reader.expect(_QUOTE)
                yield from reader.upto(_STRING_END, _MOST_SCALAR)
            else:
                raise NotACall
            yield from reader.spaces()
            if (yield from reader.expect(_OBJECT_GOES_ON)) == "}":
                break
        self._finish(reader, name, early, has_arguments)

    def _finish(
        self, reader: Reader, name: str | None, early: list[str], has_arguments: bool
    ) -> None:
        if name is None or not (has_arguments or self._may_omit_arguments):
            raise NotACall
        if early or not has_arguments:
            reader.whole_call(name, "".join(early) or "{}")
        reader.commit()


def _hold_object(reader: Reader, parts: list[str]) -> Reading[None]:
    def hold(text: str) -> None:
        parts.append(text)
        reader.hold(text)

    yield from reader.json_object(hold)


def _quoted(names: set[str]) -> Mapping[str, str]:
    """The ways in which JSON may write the names, and the names."""
    return {
        json.dumps(name, ensure_ascii=is_ascii): name
        for name in names
        for is_ascii in (True, False)
    }
