"""Linear time and a bound on what is held back, for any text. Work is counted, not timed."""

import sys

import pytest
from dialects.answers import TOOLS

from duetto.dialects.answer import answer_parser
from duetto.dialects.choose import CALL_DIALECTS
from duetto.dialects.dialect import calls_text
from duetto.dialects.reasoning import THINK

LENGTH = 400
MOST_UNREAD = 400  # characters
MOST_GROWTH = 2.3  # of the work, for twice the text


def hostile_units(calls):
    """What is repeated to make a parser look again and again at the same text."""
    call = calls_text(calls.form, [("get", {"a": "b"})])
    for marker in calls.markers[:2]:
        yield from (marker, marker[:-1], marker + '{"arguments": {')
    yield from (" ", "\n", "[", "{", '"', "<", "call:get{", "\n[get(", '{"arguments": {"a": ')
    yield from ("\n{", "```", "functools")
    yield from (call, call[: len(call) // 2])


def work(text, calls, size):
    """Lines of the dialects' code that run for a text in parts of a size; most text unread."""
    lines, most = 0, 0

    def count(frame, event, _arg):
        nonlocal lines
        if event == "line":
            lines += 1
        return count if "dialects" in frame.f_code.co_filename else None

    parser = answer_parser(calls, THINK, TOOLS)
    reader = parser._reader
    before = sys.gettrace()
    for start in range(0, len(text), size):
        sys.settrace(count)
        parser.push(text[start : start + size])
        sys.settrace(before)
        most = max(most, len(reader._text) - reader._at)
    return lines, most


@pytest.mark.parametrize("size", [7, LENGTH * 2])
@pytest.mark.parametrize("calls", CALL_DIALECTS, ids=lambda dialect: dialect.name)
def test_work_grows_as_the_text(calls, size):
    for unit in hostile_units(calls):
        text = unit * (2 * LENGTH // len(unit))
        once, _ = work(text[:LENGTH], calls, size)
        twice, most_unread = work(text, calls, size)
        assert twice <= MOST_GROWTH * once + 400, unit
        assert most_unread <= MOST_UNREAD, unit


def test_the_count_finds_what_grows_faster():
    class Slow:
        """Looks at all that has come, at each push."""

        def __init__(self):
            self._reader = self
            self._text, self._at = "", 0

        def push(self, text):
            self._text += text
            for _ in self._text:
                pass

    def lines(text):
        count = 0

        def trace(frame, event, _arg):
            nonlocal count
            count += event == "line"
            return trace

        slow, before = Slow(), sys.gettrace()
        sys.settrace(trace)
        for char in text:
            slow.push(char)
        sys.settrace(before)
        return count

    assert lines("x" * 200) > MOST_GROWTH * lines("x" * 100)
