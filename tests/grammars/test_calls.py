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


# What is written without JSON's quotes, or in a notation of its own.
MIXED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "unit": {"$ref": "#/$defs/U~0n~1t"},
        "mode": {"const": "fast"},
        "level": {"enum": ["low", None]},
        "from": {"type": ["string", "null"]},
        "days": {"type": "integer"},
        "where": {"$ref": "#/$defs/Place"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    },
    "required": ["unit", "mode", "level", "where", "count"],  # one is not among the properties
    "additionalProperties": {"type": "integer"},
    "$defs": {
        "U~n/t": {"type": "string", "enum": ["C", "F"]},
        "Place": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "x": {"type": "number"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "dialect", [d for d in CALL_DIALECTS if d.form.arguments is not None], ids=lambda d: d.name
)
@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_written_without_json_is_read_by_its_schema(dialect, parallel):
    """Random answers of any characters, brackets and quotes among them."""
    form, after = dialect.form, dialect.form.arguments.after_value
    letters = [bytes([i]) for i in (10, *range(32, 127))]
    tokens = [b"<end>", *letters, *([after.strip().encode()] if after else [])]
    special = {"<end>": 0}
    for marker in dialect.markers:
        special[marker] = len(tokens)
        tokens.append(marker.encode())
    grammars = CompiledGrammars(lambda: Vocabulary(tokens, special, frozenset({0})))
    tools = [CallableTool("get_weather", MIXED)]
    grammar = grammars.write(lambda lark: calls_alone(lark, form, tools, parallel=parallel), "t")
    found = 0
    for seed in range(6):
        rng, matcher, ids = Random(seed), grammars.matcher(grammar), list[int]()
        while matcher.seek(ids) and len(ids) < 400:
            may = np.flatnonzero(matcher.allowed()).tolist()
            longer = [i for i in may if i > len(letters)]
            token_id = rng.choice(longer if longer and rng.random() < 0.3 else may)
            if len(ids) >= 100 and (path := matcher.shortest_end(200)) is not None:
                ids += [*path, 0]
            else:
                ids.append(token_id)
        if ids[-1] != 0:
            continue  # in a text whose end nothing led to
        parser = dialect.parser([ToolSchema("get_weather", MIXED)])
        pieces = [*parser.push(b"".join(tokens[i] for i in ids[:-1]).decode()), *parser.finish()]
        texts: dict[int, str] = {}
        for piece in pieces:
            if isinstance(piece, CallArguments):
                texts[piece.index] = texts.get(piece.index, "") + piece.text
            assert not isinstance(piece, CallEnd) or piece.is_complete, pieces
        assert texts and (parallel or len(texts) == 1), pieces
        for text in texts.values():
            jsonschema.validate(json.loads(text), MIXED)
        found += len(texts)
    assert found >= 3


@pytest.mark.parametrize("text", ["}", "{", '"', "\\", '\\"}', ""])
@pytest.mark.parametrize("name", ["gemma4", "functiongemma"])
def test_a_bracket_in_a_json_string_is_read_where_others_are_delimited(name, text):
    (dialect,) = [d for d in CALL_DIALECTS if d.name == name]
    arguments = f'city:{json.dumps(text)},where:{{"name": {json.dumps(text)}}}'
    form = dialect.form
    said = f"{form.before_name}get_weather{{{arguments}{form.after_arguments}"
    assert called(dialect, said) == [("get_weather", {"city": text, "where": {"name": text}})]
