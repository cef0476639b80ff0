"""Values that are not JSON, as JSON; and the types that a schema allows."""

import ast
import json

import pytest

from duetto.dialects.literals import PYTHON, NotALiteral, object_to_json, value_to_json
from duetto.dialects.schema_types import parameter_types, typed_json


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-1_000",
        "+2.5e-3",
        ".5",
        "2.",
        "1e5",
        "True",
        "None",
        "'it\\'s'",
        '"a\\n\\x41\\u00e9\\d"',
        "'a' \"b\"",
        "[]",
        "[1, [2, ], {'a': ()}]",
        "{'a': {'b': [None, False]}, }",
        '"🙂 {[(,"',
    ],
)
def test_python_means_what_python_says(text):
    with_unknown_escapes_doubled = text.replace("\\d", "\\\\d")
    assert json.loads(value_to_json(text, PYTHON)) == json.loads(
        json.dumps(ast.literal_eval(with_unknown_escapes_doubled))
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "1 2",
            "[1",
            "1]",
            "{1: 2}",
            "{'a'}",
            "f(1)",
            "1+1",
            "'a",
            "nan",
            "-",
            ".",
            "e5",
        ),
        *("007", "[,]", "{'a': 1,,}", "0x10", "１", "a.b", "[" * 100 + "]" * 100),
    ],
)
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(NotALiteral):
        value_to_json(text, PYTHON)


def test_arguments_of_a_call():
    assert object_to_json("a=1, b={'c': 'd'}", PYTHON, "=") == '{"a": 1, "b": {"c": "d"}}'
    assert object_to_json(" ", PYTHON, "=") == "{}"
    with pytest.raises(NotALiteral):
        object_to_json("a:1", PYTHON, "=")


def test_half_a_surrogate_pair_stays_json():
    assert value_to_json('"\\ud800"', PYTHON) == '"\\ud800"'


SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "number": {"type": ["number", "null"]},
        "choice": {"enum": ["a", 1]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "named": {"$ref": "#/$defs/point"},
        "circle": {"$ref": "#/$defs/circle"},
        "wrong": {"type": 3, "anyOf": "x"},
    },
    "$defs": {"point": {"type": "object"}, "circle": {"$ref": "#/$defs/circle"}},
}


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("text", {"string"}),
        ("number", {"number", "null"}),
        ("choice", {"string", "integer"}),
        ("maybe", {"string", "null"}),
        ("named", {"object"}),
        *((name, {"string"}) for name in ("circle", "wrong", "missing")),
    ],
)
def test_types_of_a_parameter(name, types):
    assert parameter_types(SCHEMA, name) == types


@pytest.mark.parametrize(
    ("text", "types", "expected"),
    [
        ("5", {"string"}, '"5"'),
        (" 5 ", {"integer"}, "5"),
        ("5.10", {"number"}, "5.10"),
        ("true", {"boolean"}, "true"),
        ("True", {"boolean"}, "true"),
        ("null", {"string", "null"}, "null"),
        ("None", {"integer", "null"}, "null"),
        ("null", {"string"}, '"null"'),
        ('{"a": 1}', {"object"}, '{"a": 1}'),
        ("{'a': 1}", {"object"}, '{"a": 1}'),
        ("NaN", {"number"}, '"NaN"'),
        ("many", {"integer"}, '"many"'),
        ("[" * 5000, {"array"}, '"' + "[" * 5000 + '"'),
    ],
)
def test_a_value_without_quotes(text, types, expected):
    assert typed_json(text, frozenset(types)) == expected
