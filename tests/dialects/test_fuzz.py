"""Random answers: any cut gives the same, nothing is lost, what was called is read."""

import json
import random

import pytest
from dialects import fuzz
from dialects.answers import TOOLS, parsed

from duetto.dialects.choose import CALL_DIALECTS
from duetto.dialects.dialect import calls_text
from duetto.dialects.pieces import CallArguments, CallEnd, CallStart

BY_NAME = pytest.mark.parametrize("calls", CALL_DIALECTS, ids=lambda dialect: dialect.name)


@BY_NAME
def test_damaged_answers_cut_anyhow(calls):
    for seed in range(50):
        fuzz.fuzz(random.Random(f"test {calls.name} {seed}"), calls)


@BY_NAME
def test_calls_are_read_as_they_were_made(calls):
    """Round trip of names and arguments, the calls one after another."""
    rng = random.Random(calls.name)
    for _ in range(50):
        num_calls = 1 if calls.form.separator is None else rng.randrange(1, 4)
        made = [fuzz.random_call(rng) for _ in range(num_calls)]
        pieces = parsed(lambda: calls.parser(TOOLS), [calls_text(calls.form, made)])
        names = [piece.name for piece in pieces if isinstance(piece, CallStart)]
        arguments = [json.loads(piece.text) for piece in pieces if isinstance(piece, CallArguments)]
        assert list(zip(names, arguments, strict=True)) == made
        assert sum(piece == CallEnd(i // 3) for i, piece in enumerate(pieces)) == len(made)
        assert len(pieces) == 3 * len(made)


@BY_NAME
def test_a_call_in_an_answer_that_is_cut_off(calls):
    """Wherever an answer ends, what it had said before stands."""
    text = "So: \n" + calls_text(calls.form, [("get_weather", {"city": 'O"s', "days": 3})])
    whole = parsed(lambda: calls.parser(TOOLS), [text])
    for end in range(len(text)):
        pieces = parsed(lambda: calls.parser(TOOLS), [text[:end]])
        fuzz.check(text[:end], pieces, calls, None)
        if any(piece == CallEnd(0) for piece in pieces):
            assert pieces == whole


@BY_NAME
def test_no_tools_no_calls(calls):
    text = calls_text(calls.form, [("get", {})])
    pieces = parsed(lambda: calls.parser(()), [text])
    assert not any(isinstance(piece, CallStart) for piece in pieces)


def test_the_check_finds_what_is_lost_or_doubled():
    calls = CALL_DIALECTS[0]
    text = "one two"
    [content] = parsed(lambda: calls.parser(TOOLS), [text])
    for wrong in ("one to", "one twoo", "two one", "ne two"):
        assert not fuzz.is_all_there(text, [type(content)(wrong)], calls, None)
    assert fuzz.is_all_there(text, [content], calls, None)
