"""Grammars of calls in the forms that dialects have: a dialect's parser reads what a grammar
writes, and a grammar accepts what a dialect writes."""

import json
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest

from duetto.core.structured import Grammar, Vocabulary
from duetto.dialects.choose import CALL_DIALECTS
from duetto.dialects.dialect import CallDialect, calls_text
from duetto.dialects.pieces import CallArguments, CallEnd, CallStart, ToolSchema
from duetto.grammars.calls import CallableTool, calls_alone, calls_among_text
from duetto.grammars.compile import CompiledGrammars

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "exact"],
    "additionalProperties": False,
}
TOOLS = {
    "get_weather": PARAMETERS,
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
CALLABLE = [CallableTool(name, parameters) for name, parameters in TOOLS.items()]
SCHEMAS = [ToolSchema(name, parameters) for name, parameters in TOOLS.items()]
END = 256
ARGUMENTS = {"city": "Paris", "days": 3, "unit": "C", "exact": True}


def grammars_of(dialect: CallDialect, *, are_special: bool) -> CompiledGrammars:
    """Of bytes; the dialect's markers may be tokens that are no text."""
    markers = [m for m in dialect.markers if are_special and len(m) > 3]
    tokens = [*(bytes([i]) for i in range(256)), b"<end>", *(m.encode() for m in markers)]
    special = {"<end>": END} | {marker: END + 1 + i for i, marker in enumerate(markers)}
    made = CompiledGrammars(lambda: Vocabulary(tokens, special, frozenset({END})))
    made.tokens = tokens  # for the test alone
    return made


def follows(grammars: Any, grammar: Grammar, text: str) -> bool:
    """Whether it is an answer of the grammar."""
    matcher, ids, data = grammars.matcher(grammar), list[int](), text.encode()
    while data:
        special = [
            i for i in range(END + 1, len(grammars.tokens)) if data.startswith(grammars.tokens[i])
        ]
        ids.append(max(special, key=lambda i: len(grammars.tokens[i]), default=data[0]))
        data = data[len(grammars.tokens[ids[-1]]) :]
        if not matcher.seek(ids):
            return False
    return bool(matcher.allowed()[END])


def called(dialect: CallDialect, text: str) -> list[tuple[str, Any]]:
    """The calls that the dialect reads. They are whole."""
    parser = dialect.parser(SCHEMAS)
    calls: dict[int, list[str]] = {}
    for piece in (*parser.push(text), *parser.finish()):
        if isinstance(piece, CallStart):
            calls[piece.index] = [piece.name, ""]
        elif isinstance(piece, CallArguments):
            calls[piece.index][1] += piece.text
        elif isinstance(piece, CallEnd):
            assert piece.is_complete, text
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


each_dialect = pytest.mark.parametrize("dialect", CALL_DIALECTS, ids=lambda d: d.name)


@each_dialect
@pytest.mark.parametrize("are_special", [False, True])
def test_what_a_dialect_writes_is_accepted(dialect, are_special):
    grammars, form = grammars_of(dialect, are_special=are_special), dialect.form
    alone = grammars.write(lambda lark: calls_alone(lark, form, CALLABLE), "tools")
    single = grammars.write(lambda lark: calls_alone(lark, form, CALLABLE, parallel=False), "tools")
    among = grammars.write(lambda lark: calls_among_text(lark, form, CALLABLE), "tools")
    one = calls_text(form, [("get_weather", ARGUMENTS)])
    two = calls_text(form, [("get_weather", ARGUMENTS), ("now", {})])
    assert follows(grammars, alone, one) and follows(grammars, single, one)
    assert follows(grammars, alone, two) is (form.separator is not None)
    assert not follows(grammars, single, two)
    assert follows(grammars, among, "It is so: ") and follows(grammars, among, f"Well.\n{one}")
    assert not follows(grammars, alone, f"Well. {one}")
    assert not follows(grammars, among, one.replace("get_weather", "get_other"))


@pytest.mark.parametrize(
    "dialect", [d for d in CALL_DIALECTS if d.form.arguments is None], ids=lambda d: d.name
)
def test_what_a_grammar_writes_is_read(dialect):
    """Random answers; each parses, and its arguments follow their schema."""
    grammars, form, found = grammars_of(dialect, are_special=False), dialect.form, 0
    grammar = grammars.write(lambda lark: calls_alone(lark, form, CALLABLE), "tools")
    letters = {*b"abcXYZ 0123"}
    for seed in range(4):
        rng, matcher, ids = Random(seed), grammars.matcher(grammar), list[int]()
        while True:
            assert matcher.seek(ids)
            may = np.flatnonzero(matcher.allowed()).tolist()
            plain = [i for i in may if i in letters]
            if len(ids) == 60 and (path := matcher.shortest_end(200)) is not None:
                ids += path
                break
            # In free text mostly letters, and now and then what may end it.
            token_id = rng.choice(plain if len(may) > 60 and rng.random() < 0.7 else may)
            if len(may) > 60 and token_id >= 128:
                token_id = ord("a")
            if token_id == END:
                break
            ids.append(token_id)
        text = bytes(ids).decode()
        calls = called(dialect, text)
        assert calls, text
        found += len(calls)
        for name, arguments in calls:
            loose = {k: v for k, v in TOOLS[name].items() if k != "properties"}
            assert set(arguments) <= set(TOOLS[name]["properties"]), text
            jsonschema.validate(arguments, loose | {"additionalProperties": True})
    assert found >= 4
