"""Every answer that has ended is valid, by a validator that is not ours: schemas with each kind of
keyword, random models at a high temperature, batched, preempted and with drafts."""

import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from fakes import make_request
from grammar_world import ENDS, TOKENS, asked, decode, make_grammars, text_of
from guessers import Eager
from small_models import KINDS, MAX_LEN, VOCAB, Model, make_model

from duetto.core.request import FinishReason
from duetto.core.speculation import NgramOptions
from duetto.runner.masks import Masks
from duetto.runner.proposers.ngram import NgramProposer

GRAMMARS = make_grammars()
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def record(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], **more}


SCHEMAS: list[Any] = [
    # kinds of values
    TEXT, NUMBER, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"type": "object"},
    {"type": "array"}, {"type": ["string", "null"]}, {"type": ["integer", "array", "boolean"]},
    {}, True, {"const": "name"}, {"const": {"a": [1, None]}}, {"const": 20},
    {"enum": ["a", "ab", 2, None, [True]]}, {"enum": ["x"], "type": "string"},
    # strings
    {"type": "string", "minLength": 3}, {"type": "string", "maxLength": 4},
    {"type": "string", "minLength": 2, "maxLength": 2},
    {"type": "string", "pattern": "^[a-c]{2,}$"},
    {"type": "string", "pattern": "ab"}, {"type": "string", "pattern": "^(a|b|x=)+$"},
    {"type": "string", "pattern": "^a", "maxLength": 5},
    *({"type": "string", "format": name} for name in
      ("date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname")),
    # numbers
    {"type": "integer", "minimum": 7, "maximum": 31}, {"type": "integer", "exclusiveMinimum": -3},
    {"type": "number", "minimum": 0.5, "maximum": 1.25}, {"type": "integer", "multipleOf": 5},
    {"type": "number", "exclusiveMaximum": 0}, {"type": "integer", "maximum": -100},
    {"type": "integer", "minimum": 10**6}, {"type": "number", "multipleOf": 0.5},
    # arrays
    {"type": "array", "items": NUMBER, "minItems": 1},
    {"type": "array", "items": TEXT, "maxItems": 2},
    {"type": "array", "prefixItems": [TEXT, NUMBER], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "null"}},
    {"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 2}},
    # objects
    record({"a": TEXT, "b": NUMBER}), record({"a": TEXT, "b": NUMBER}, "a", "b"),
    record({"name": TEXT, "age": NUMBER}, "age", additionalProperties=False),
    record({}, additionalProperties={"type": "boolean"}), record({}, "ab", "name"),
    {"type": "object", "patternProperties": {"^x": NUMBER}, "additionalProperties": False},
    {"type": "object", "additionalProperties": TEXT, "minProperties": 1},
    {"type": "object", "additionalProperties": NUMBER, "maxProperties": 2},
    record({"a": record({"b": record({"c": {"enum": ["x"]}}, "c")}, "b")}, "a"),
    # applicators and references
    {"anyOf": [TEXT, NUMBER, {"type": "array", "items": NUMBER}]},
    {"anyOf": [record({"a": {"const": 1}}, "a"), record({"b": {"const": 2}}, "b")]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"oneOf": [record({"name": {"const": "a"}}, "name"), record({"name": {"const": "b"}}, "name")]},
    {"allOf": [record({"a": TEXT}, "a"), record({"b": NUMBER}, "b")]},
    {"allOf": [{"minimum": 3}, {"maximum": 9}], "type": "integer"},
    {"$defs": {"n": {"type": "integer", "minimum": 1}}, "type": "array",
     "items": {"$ref": "#/$defs/n"}},
    {"$defs": {"t": record({"name": TEXT, "ab": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
                           "name")}, "$ref": "#/$defs/t"},
    {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    {"definitions": {"x": {"enum": ["a", "x"]}}, "properties": {"a": {"$ref": "#/definitions/x"}},
     "type": "object", "required": ["a"]},
    {"$ref": "#/$defs/s", "$defs": {"s": {"type": "string"}}, "maxLength": 3},
    # what changes nothing
    {"title": "T", "description": "d", "default": 1, "examples": [1], "$comment": "c",
     "type": "integer", "$schema": "https://json-schema.org/draft/2020-12/schema"},
]  # fmt: skip
MAX_TOKENS = 110


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return make_model(KINDS[3], tmp_path_factory.mktemp("model"))


def is_valid(schema: Any, text: str) -> bool:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    return validator.is_valid(json.loads(text))


def test_all_that_ends_is_valid(model):
    proposers = {"ngram": NgramProposer(NgramOptions(), 64)}
    engine = model.engine(
        masks=Masks(GRAMMARS),
        decode=decode,
        proposers=proposers,
        drafts=Eager([*proposers]),
        num_blocks=2 * MAX_LEN // 8,
        max_num_seqs=32,
    )
    rng, texts = np.random.default_rng(1), dict[str, list[int]]()
    for index, schema in enumerate(SCHEMAS):
        request = make_request(
            *(str(index), rng.integers(0, VOCAB, 5).tolist(), MAX_TOKENS),
            grammar=GRAMMARS.make(asked(json=schema)),
            temperature=1.5,
            seed=index,
        )
        engine.add(replace(request, stop_token_ids=frozenset(ENDS)))
    ended = dict[str, FinishReason]()
    while engine.has_work:
        for update in engine.step().updates:
            assert update.error is None, (SCHEMAS[int(update.request_id)], update.error)
            tokens = texts.setdefault(update.request_id, [])
            tokens += [token.token_id for token in update.tokens]
            if update.finish_reason is not None:
                ended[update.request_id] = update.finish_reason
    assert len(ended) == len(SCHEMAS) >= 60
    assert engine.scheduler.counts.num_preemptions > 3
    for index, schema in enumerate(SCHEMAS):
        text = text_of(texts[str(index)])
        # Each of them can end in so few tokens, and is led to it.
        assert ended[str(index)] is FinishReason.STOP, (schema, text)
        assert is_valid(schema, text), (schema, text)
    assert len({text_of(tokens) for tokens in texts.values()}) > 50


def test_the_validator_sees_what_is_wrong():
    assert not is_valid({"type": "string", "format": "date"}, '"20-20"')
    assert not is_valid({"type": "integer"}, '"a"')
    assert b"Z" in TOKENS
