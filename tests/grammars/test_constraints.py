"""Constraints to grammars: what is refused, in which words, within which bounds; and tags."""

import json
import subprocess
import sys
import threading
from time import monotonic
from typing import Any

import msgspec
import numpy as np
import pytest
from grammar_world import CALL, ENDS, TOKENS, VOCABULARY, asked, make_grammars

from duetto import InvalidRequest
from duetto.core.batch import SamplingInput
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar, StructuredOutputsParams, Vocabulary
from duetto.grammars import compile as compiling
from duetto.grammars.compile import CompiledGrammars
from duetto.grammars.json_schema import ImpossibleSchema
from duetto.grammars.lark import LarkWriter
from duetto.grammars.tags import (
    ReasoningMarks,
    Tag,
    free_until_tag,
    json_content,
    only_tags,
    reasoning_first,
)

GRAMMARS = make_grammars()


def refusal(**constraint: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.make(asked(**constraint))
    return caught.value


def accepts(grammar: Grammar, text: str) -> bool | None:
    """Whether a text is an answer of the grammar; None: it is the beginning of one."""
    matcher, tokens = GRAMMARS.matcher(grammar), list[int]()
    data = text.encode()
    while data:
        fitting = [
            i
            for i in np.flatnonzero(matcher.allowed()).tolist()
            if TOKENS[i] and data.startswith(TOKENS[i]) and i not in ENDS
        ]
        if not fitting:
            return False
        tokens.append(max(fitting, key=lambda i: len(TOKENS[i])))
        data = data[len(TOKENS[tokens[-1]]) :]
        assert matcher.seek(tokens)
    return True if matcher.allowed()[list(ENDS)].all() else None


@pytest.mark.parametrize(
    ("constraint", "field", "words"),
    [
        ({"json": {"properties": {"a": {"not": {}}}}}, "json", ("#/properties/a/not", '"not"')),
        ({"json": {"items": {"type": "array", "uniqueItems": True}}}, "json",
         ("#/items/uniqueItems",)),
        ({"json": {"if": {}, "then": {}}}, "json", ("#/if", "then")),
        ({"json": {"contains": {"type": "string"}}}, "json", ("contains",)),
        ({"json": {"type": "string", "format": "zzz"}}, "json", ("#/format", "zzz")),
        ({"json": {"type": "string", "pattern": "(?<!a)b"}}, "json", ("look-around",)),
        ({"json": {"type": "text"}}, "json", ("#/type", "Invalid type: text")),
        ({"json": {"$ref": "https://x.y/z"}}, "json", ("https://x.y/z",)),
        ({"json": {"$ref": "#/nowhere"}}, "json", ("/nowhere",)),
        ({"json": {"x-guidance": {}}}, "json", ("#/x-guidance",)),
        ({"json": '{"a":'}, "json", ("not valid JSON",)),
        ({"json": "[1]"}, "json", ("must be an object",)),
        ({"json": '{"const": NaN}'}, "json", ("NaN",)),
        ({"json": '{"const": 1e999}'}, "json", ("too large",)),
        ({"json": {"a": {"const": -(2**63)}}}, "json", ("#/a/const", "-2**63")),
        ({"json": {"type": "integer", "maximum": -1e30}}, "json", ("#/maximum", "-2**63")),
        ({"json": {"default": {"enum": [-9223372036854775297]}}}, "json", ("#/default/enum/0",)),
        ({"grammar": 'start: %json {"const": -9.3e18}'}, "grammar", ("#/const", "-2**63")),
        ({"json": {"items": {"multipleOf": 999_983}}}, "json", ("#/items/multipleOf", "10000")),
        ({"json": {"multipleOf": 2**31}}, "json", ("#/multipleOf: 2147483648",)),
        ({"json": {"multipleOf": 1e300}}, "json", ("#/multipleOf: 1e+300",)),
        ({"json": {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}}, "json",
         ("#/allOf/0/multipleOf: 997", "with others")),
        ({"grammar": 'start: %json {"multiple\\u004ff": 999983}'}, "grammar", ("#/multipleOf",)),
        ({"grammar": "start: %json x"}, "grammar", ("no JSON schema behind %json",)),
        ({"json": '{"const": "\\ud800"}'}, "json", ("U+D800", "half of a character")),
        ({"json": {"properties": {"\udfff": {}}}}, "json", ("U+DFFF",)),
        ({"json": {}, "whitespace_pattern": "\ud800"}, "json", ("U+D800",)),
        ({"regex": "a\ud800"}, "regex", ("U+D800",)),
        ({"choice": ["a", "\udc00"]}, "choice", ("U+DC00",)),
        ({"structural_tag": '{"format": {"type": "const_string", "value": "\\udc00"}}'},
         "structural_tag", ("U+DC00",)),
        ({"json": {"oneOf": [{"type": "string"}, {"minLength": 1}]}}, "json", ("#/oneOf",)),
        ({"regex": "(?=a)b"}, "regex", ("look-around",)),
        ({"regex": "((("}, "regex", ("unclosed group",)),
        ({"regex": "[b-a]"}, "regex", ("invalid",)),
        ({"regex": "界|✓"}, "regex", ("no token of this model spells",)),
        ({"grammar": "start: nowhere"}, "grammar", ("nowhere",)),
        ({"grammar": "start: <|nowhere|>"}, "grammar", ("<|nowhere|>",)),
        ({"grammar": "root ::= nowhere"}, "grammar", ("nowhere",)),
        ({"grammar": "what is this"}, "grammar", ("is no grammar",)),
        ({"structural_tag": {"a": 1}}, "structural_tag", ("structures and triggers",)),
        ({"structural_tag": {"format": {"type": "x"}}}, "structural_tag",
         ("$.format.type", "triggered_tags")),
        ({"structural_tag": {"structures": [], "triggers": ["<"]}}, "structural_tag",
         ("$.structures",)),
        ({"structural_tag": {"structures": [{"begin": "<a>", "schema": {}, "end": ""}],
          "triggers": ["x"]}}, "structural_tag", ("$.triggers", "<a>")),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_named_with_its_place(constraint, field, words):
    error = refusal(**constraint)
    assert error.field == f"structured_outputs.{field}"
    for word in words:
        assert word in error.message, error.message
    assert len(error.message) < 400 and "panic" not in error.message


@pytest.fixture
def unhurried(monkeypatch):
    """A search ends by what it has tried, however busy the machine is."""
    monkeypatch.setattr(compiling, "LOCATING_S", 600.0)


BACKWARDS = {"type": "integer", "minimum": 5, "maximum": 3}
EMPTY = {"$ref": "#/$defs/a~1b", "$defs": {"a/b": BACKWARDS}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (False, "at # it is false"),
        (BACKWARDS, "at #, type, minimum and maximum contradict each other"),
        ({**BACKWARDS, "title": "x", "multipleOf": 2},
         "at #, type, minimum and maximum contradict each other"),
        ({"enum": []}, "at #, enum leaves no value"),
        ({"enum": ["a"], "const": "b"}, "at #, enum and const contradict each other"),
        ({"type": "string", "const": 3}, "at #, type and const contradict each other"),
        ({"allOf": [{"type": "null"}, {"type": "string"}]}, "at #, allOf leaves no value"),
        ({"allOf": [{"type": "integer"}, BACKWARDS]},
         "at #/allOf/1, type, minimum and maximum contradict each other"),
        ({"anyOf": [False, {"enum": []}]}, "at #, anyOf leaves no value"),
        ({"type": "object", "required": ["b"], "additionalProperties": False},
         "at #, type, required and additionalProperties contradict each other"),
        ({"type": "object", "properties": {"x": {"type": "object", "properties": {"a": BACKWARDS},
          "required": ["a"]}, "y": False}, "required": ["x"]},
         "at #/properties/x/properties/a, type, minimum and maximum contradict each other"),
        ({"type": "array", "items": False, "minItems": 1}, "at #/items it is false"),
        ({"type": "array", "prefixItems": [{}, {"enum": []}], "minItems": 2},
         "at #/prefixItems/1, enum leaves no value"),
        ({"type": "array", "items": EMPTY, "minItems": 1, **EMPTY},
         "at #/$defs/a~1b, type, minimum and maximum contradict each other"),
    ],
    ids=str,
)  # fmt: skip
def test_what_allows_nothing_is_told_with_its_place_and_keywords(schema, words, unhurried):
    error = refusal(json=schema)
    assert isinstance(error, ImpossibleSchema)
    assert error.field == "structured_outputs.json"
    assert error.message == f"allows nothing: {words}"


def test_a_search_for_the_place_ends(unhurried):
    """Bounded where there are more schemas than are tried: the innermost that was found."""
    properties = {f"p{i}": {"type": "string"} for i in range(100)} | {"last": False}
    error = refusal(json={"type": "object", "properties": properties, "required": [*properties]})
    assert error.message == "allows nothing: at #/properties/last it is false"
    members = [{"type": "integer", "minimum": i} for i in range(100)]
    error = refusal(json={"allOf": [*members, BACKWARDS]})
    assert error.message == "allows nothing: at #, allOf leaves no value"
    tag = {"structures": [{"begin": "<a>", "schema": BACKWARDS, "end": ""}], "triggers": ["<a>"]}
    assert "allows nothing" in refusal(structural_tag=tag).message


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "structured_outputs"),
        ({"json": {}, "regex": "a"}, "structured_outputs"),
        ({"json": 5}, "structured_outputs.json"),
        ({"json": {"const": float("nan")}}, "structured_outputs.json"),
        ({"regex": 5}, "structured_outputs.regex"),
        ({"regex": ""}, "structured_outputs.regex"),
        ({"choice": "ab"}, "structured_outputs.choice"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"choice": [1]}, "structured_outputs.choice"),
        ({"choice": ["a"] * 5000}, "structured_outputs.choice"),
        ({"json_object": "yes"}, "structured_outputs.json_object"),
        ({"json_object": True, "disable_any_whitespace": 1},
         "structured_outputs.disable_any_whitespace"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_named(given, field):
    with pytest.raises(InvalidRequest) as caught:
        asked(**given)
    assert caught.value.field == field


def test_with_ignore_eos():
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        SamplingParams(structured_outputs=asked(regex="a"), ignore_eos=True)
    with pytest.raises(InvalidRequest, match="structured_outputs: must be"):
        SamplingParams(structured_outputs={"regex": "a"})


def test_what_crosses_is_plain():
    params = SamplingParams(structured_outputs=asked(json={"b": 1, "a": 2}))
    packed = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(packed, type=SamplingParams) == params
    assert params.structured_outputs.json == '{"b": 1, "a": 2}', "the order of keys is kept"
    row = SamplingInput(SamplingParams(), 1, 2, grammar=Grammar("text", "key"), num_left=3)
    packed = msgspec.msgpack.encode(row)
    assert msgspec.msgpack.decode(packed, type=SamplingInput) == row


def test_the_library_is_loaded_when_the_first_constraint_comes():
    code = (
        "import sys, duetto.build, duetto.server.app; assert 'llguidance' not in sys.modules;"
        "from duetto import StructuredOutputsParams; StructuredOutputsParams(json={});"
        "assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "accepted", "refused"),
    [
        ({}, ('{"a":1,"b":2}', '{ "a": 1,\n  "b": 2 }'), ('{   "a":1}', ' {"a":1}')),
        ({"disable_any_whitespace": True}, ('{"a":1}',), ('{"a": 1}',)),
        ({"whitespace_pattern": " {4}"}, ('{    "a":1}',), ('{ "a":1}',)),
        ({"disable_additional_properties": True}, ('{"a":1}',), ('{"a":1,"b":2}',)),
    ],
    ids=str,
)
def test_options_of_json(options, accepted, refused):
    grammar = GRAMMARS.make(asked(json={"properties": {"a": {}}, "type": "object"}, **options))
    assert [accepts(grammar, text) for text in accepted] == [True] * len(accepted)
    assert not any(accepts(grammar, text) for text in refused)


def test_additional_properties_are_closed_where_schemas_are():
    """A property of that name is none of the keyword's."""
    schema = {"type": "object", "properties": {"name": {"type": "object", "properties": {}}}}
    grammar = GRAMMARS.make(asked(json=schema, disable_additional_properties=True))
    assert accepts(grammar, '{"name":{}}')
    assert not accepts(grammar, '{"name":{"a":1}}') and not accepts(grammar, '{"a":1}')


# --- bounds --------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(length: int) -> dict[str, Any]:
    """References, each to the next one: whoever follows them by recursion needs a deep stack."""
    links = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(length)}
    return {"$defs": {**links, str(length): {"type": "string"}}, "$ref": "#/$defs/0"}


HOSTILE: dict[str, dict[str, Any]] = {
    "references": {"json": chain(7500)},
    "rules": {"grammar": "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(17_000))])
              + '\nr17000: "a"'},
    "terminals": {"grammar": "\n".join(["start: T0", *(f"T{i}: T{i + 1}" for i in range(17_000))])
                  + '\nT17000: "a"'},
    "many rules": {"grammar": "root ::= r0\n" + "r0 ::= r0\n" * 20_000},
    "enum": {"json": {"enum": [f"{i}-{'x' * 40}" for i in range(1000)]}},
    "properties": {"json": {"type": "object", "properties": {
        f"p{i}": {"type": "string", "maxLength": 1000} for i in range(1000)}}},
    "any of": {"json": {"anyOf": [
        {"type": "object", "properties": {"a": {"const": i}}} for i in range(500)]}},
    "recursion": {"json": {"$defs": {"a": {"anyOf": [{"type": "null"}, {"type": "array", "items": {
        "$ref": "#/$defs/a"}}]}}, "$ref": "#/$defs/a"}},
    "a circle": {"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                          "$ref": "#/$defs/a"}},
    "itself": {"json": {"$ref": "#"}},
    "deep": {"json": nested(40)},
    "too deep": {"json": nested(200)},
    "bounds": {"json": {"type": "array", "minItems": 10**6, "items": {"type": "string"}}},
    "length": {"json": {"type": "string", "minLength": 10**7}},
    "number": {"json": {"type": "number", "multipleOf": 1e-30}},
    "of a large": {"json": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}},
    "all of": {"json": {"allOf": [{"anyOf": [{"type": "string", "pattern": f"{a}+"} for a in "abc"]}
                                  for _ in range(6)]}},
    "pattern": {"json": {"type": "string", "pattern": "^(a+)+$"}},
    "catastrophe": {"regex": "((a+)+)+b(a|aa)*"},
    "repeated": {"regex": "((a{1,200}){1,200}){1,200}"},
    "far back": {"regex": "(a|b)*a(a|b){14}"},
    "unicode": {"regex": "\\p{L}{1,500}x\\p{L}{1,500}"},
    "nothing for ever": {"regex": "(a*)*"},
    "left recursion": {"grammar": "start: start start | \"a\""},
    "ambiguous": {"grammar": 'start: a a a a a\na: | "x" | a a'},
    "gbnf": {"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000},
    "bytes": {"regex": "a" * 300_000},
    "pairs": {"json": {"type": "object", "patternProperties": {
        f"^{c}{'.' * 8}": {} for c in "abcdefghij"}}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_is_refused_or_works(name):
    """In bounded time: the deadline is the bound, and what is compiled can be followed."""
    grammars, begun = make_grammars(), monotonic()
    try:
        grammar = grammars.make(asked(**HOSTILE[name]))
    except InvalidRequest as error:
        assert error.field.startswith("structured_outputs.")
        assert len(error.message) < 400
        return
    finally:
        assert monotonic() - begun < 60, "a bound, and no measurement"
    matcher, tokens = grammars.matcher(grammar), list[int]()
    for _ in range(12):
        assert matcher.seek(tokens)
        may = np.flatnonzero(matcher.allowed())
        assert len(may)
        if may[-1] in ENDS and len(may) <= len(ENDS):
            break
        tokens.append(next(int(i) for i in may if i not in ENDS))


def test_what_takes_too_long_is_refused(monkeypatch):
    """Nobody waits for it, and those that follow wait for their turn no longer than that."""
    gate, grammars = threading.Event(), make_grammars()
    grammars.make(asked(regex="a"))
    grammars = CompiledGrammars(lambda: VOCABULARY, deadline_s=0.05)
    compile_ = CompiledGrammars._compile

    def slow(self, grammar, field):
        gate.wait(20)
        return compile_(self, grammar, field)

    monkeypatch.setattr(CompiledGrammars, "_compile", slow)
    for pattern in ("ab", "abb", "abbb"):  # the third finds no place at all
        with pytest.raises(InvalidRequest, match=r"structured_outputs.regex: takes more than"):
            grammars.make(asked(regex=pattern))
    gate.set()
    grammars._working.acquire(timeout=20)
    grammars._working.release()
    grammars._deadline_s = 20
    assert grammars.make(asked(regex="ab")).key


def test_what_is_compiled_is_kept_and_falls_out(monkeypatch):
    monkeypatch.setattr(compiling, "MAX_KEPT", 3)
    grammars = make_grammars()
    first = grammars.make(asked(regex="a1"), b"alice")
    assert grammars.make(asked(regex="a1"), b"alice") is first
    assert grammars.make(asked(regex="a1"), b"bob").key != first.key, "tenants share nothing"
    for i in range(2, 6):
        grammars.make(asked(regex=f"a{i}"), b"bob")
    assert first.key in grammars._kept, "a flood takes only what is its own"
    assert len(grammars._kept) == 3
    monkeypatch.setattr(compiling, "MAX_KEPT_BYTES", 0)
    grammars.make(asked(regex="b"))
    assert not grammars._kept
    assert grammars.matcher(first).seek([TOKENS.index(b"a")]), "compiled once more"


def test_a_model_without_an_end():
    grammars = CompiledGrammars(lambda: Vocabulary([b"a"], {}, frozenset()))
    with pytest.raises(InvalidRequest, match="no token that ends a text"):
        grammars.make(asked(regex="a"))


# --- tags ----------------------------------------------------------------------------------------

AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"],
       "additionalProperties": False}  # fmt: skip


def written(start) -> Grammar:
    return GRAMMARS.write(start, "tools")


def tags(lark: LarkWriter, *begins: str, end: str = "</a>") -> list[Tag]:
    return [Tag(begin, json_content(lark, AGE, "tools"), end) for begin in begins]


def test_free_text_until_a_marker():
    grammar = written(lambda lark: free_until_tag(lark, tags(lark, "<a>")))
    for text in ("", "x b y", '<a>{"age":20}</a>', 'x<a>{"age":2}</a> y <a>{"age":3}</a>z'):
        assert accepts(grammar, text), text
    for text in ("<a>x", '<a>{"age":20}<', 'x<a>{"age":2}</a><a> x', '<a>{"b"'):
        assert accepts(grammar, text) is False, text
    assert accepts(grammar, '<a>{"age":20}') is None, "it must be closed"
    assert accepts(grammar, f"x {TOKENS[CALL].decode()}") is False, "special tokens are no text"


def test_a_marker_that_is_a_special_token():
    call = TOKENS[CALL].decode()
    grammar = written(lambda lark: free_until_tag(lark, tags(lark, call, end="")))
    assert accepts(grammar, "xy") and accepts(grammar, f'xy{call}{{"age":20}}')
    assert accepts(grammar, f'{call}{{"age":1}}{call}{{"age":2}} x')
    assert accepts(grammar, f"xy{call}x") is False and accepts(grammar, call) is None


def test_tags_of_one_trigger_and_one_call_only():
    def start(lark: LarkWriter) -> str:
        both = tags(lark, "<a>name", "<a>ab")
        return free_until_tag(lark, both, ["<a>"], only_one=True)

    grammar = written(start)
    assert accepts(grammar, 'x<a>ab{"age":1}</a>') and accepts(grammar, '<a>name{"age":1}</a>')
    assert accepts(grammar, "x") and accepts(grammar, "<a>x") is False
    assert accepts(grammar, '<a>ab{"age":1}</a> ') is False, "nothing follows the only one"


def test_at_least_one_among_text():
    grammar = written(lambda lark: free_until_tag(lark, tags(lark, "<a>"), at_least_one=True))
    assert accepts(grammar, "xy") is None and accepts(grammar, 'xy<a>{"age":1}</a>z')


@pytest.mark.parametrize("only_one", [False, True])
def test_only_tags(only_one):
    def start(lark: LarkWriter) -> str:
        return only_tags(lark, tags(lark, "<a>", "x="), ",", only_one=only_one)

    grammar = written(start)
    assert accepts(grammar, '<a>{"age":1}</a>') and accepts(grammar, 'x={"age":1}</a>')
    two = accepts(grammar, '<a>{"age":1}</a>,x={"age":1}</a>')
    assert two is (not only_one)
    assert accepts(grammar, "") is None and accepts(grammar, "a") is False


@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("<a>", "</a>")])
def test_reasoning_first(has_begun, marks):
    """Between special tokens, and between texts."""

    def start(lark: LarkWriter) -> str:
        return reasoning_first(
            lark, ReasoningMarks(*marks, has_begun=has_begun), json_content(lark, AGE, "x")
        )

    grammar, (begin, end) = written(start), marks
    shown = "" if has_begun else begin
    assert accepts(grammar, f'{shown}why {{x\n{end}{{"age":1}}')
    assert accepts(grammar, f'{shown}{end}\n\n{{"age":1}}')
    assert accepts(grammar, f"{shown}x{end}x") is False
    assert accepts(grammar, f"{shown}x") is None
    assert (accepts(grammar, '{"age":1}') is True) is not has_begun


@pytest.mark.parametrize(
    ("tag", "accepted", "refused"),
    [
        ({"structures": [{"begin": "<a>", "schema": AGE, "end": "</a>"}], "triggers": ["<a"]},
         ('x <a>{"age":1}</a> y', "x"), ("<a ", "<a>x")),
        ({"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<a>"],
          "tags": [{"begin": "<a>", "content": {"type": "json_schema", "json_schema": AGE},
                    "end": "</a>"}], "at_least_one": True, "stop_after_first": True}},
         ('x <a>{"age":1}</a>',), ('<a>{"age":1}</a> ',)),
        ({"format": {"type": "sequence", "elements": [
            {"type": "const_string", "value": "ab"},
            {"type": "or", "elements": [{"type": "regex", "pattern": "[0-9]+/"},
                                        {"type": "const_string", "value": "x"}]},
            {"type": "any_text"}]}}, ("ab12/ name", "abx", "abx\n\n"), ("a1", "abz")),
        ({"format": {"type": "tag", "begin": "<think>", "content": {"type": "any_text"},
                     "end": "</think>"}}, ("<think>x {y</think>",), ("x", "<think>x</think> ")),
        ({"format": {"type": "tags_with_separator", "separator": "\n", "at_least_one": False,
          "tags": [{"type": "tag", "begin": "<a>", "content": {"type": "const_string",
                    "value": "x"}, "end": "</a>"}]}},
         ("", "<a>x</a>", "<a>x</a>\n<a>x</a>"), ("x", "<a>x</a><a>")),
    ],
    ids=lambda value: json.dumps(value)[:50],
)  # fmt: skip
def test_structural_tags(tag, accepted, refused):
    for given in (tag, json.dumps(tag)):
        grammar = GRAMMARS.make(StructuredOutputsParams(structural_tag=given))
        assert [accepts(grammar, text) for text in accepted] == [True] * len(accepted)
        assert not any(accepts(grammar, text) for text in refused)


def test_reasoning_is_led_to_its_end_by_a_token_that_marks_it():
    def start(lark: LarkWriter) -> str:
        marks = ReasoningMarks("<think>", "</think>", has_begun=True)
        return reasoning_first(lark, marks, json_content(lark, AGE, "x"))

    matcher, letter = GRAMMARS.matcher(written(start)), TOKENS.index(b"a")
    path = matcher.shortest_end(40)
    assert path is not None and b"".join(TOKENS[i] for i in path) == b'</think>{"age":0}'
    assert matcher.steered([letter], letter, len(path) + 1) == TOKENS.index(b"</think>")
    assert matcher.steered([letter], letter, len(path) + 2) == letter
