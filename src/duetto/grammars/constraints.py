"""What callers ask for, as llguidance reads it: one function for each kind of constraint.

Refuses what can be seen without compiling; grammars/compile.py compiles.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from json import JSONDecoder
from typing import Any

from duetto.core.errors import InvalidRequest
from duetto.core.structured import FIELD, StructuredOutputsParams
from duetto.grammars.json_schema import (
    WHITESPACE,
    JsonOptions,
    check_numbers,
    check_unicode,
    prepared_schema,
    read_json_text,
)
from duetto.grammars.lark import LarkWriter, quoted
from duetto.grammars.structural_tag import structural_tag

MAX_BYTES = 2**18  # of a constraint
MAX_GBNF = 2**15  # half a second to convert, and four times that for twice as much
_SCHEMA = re.compile(r"%json\s*")


def grammar_text(asked: StructuredOutputsParams, special: Mapping[str, int]) -> str:
    """The grammar of a constraint, for a vocabulary with these special tokens. Raises
    InvalidRequest."""
    lark = LarkWriter(special)
    field = f"{FIELD}.{asked.kind}"
    check_size(field, *(asked.choice or ()), _source(asked), asked.whitespace_pattern or "")
    if asked.json is not None:
        return lark.text(lark.schema(prepared_schema(str(asked.json), field, json_options(asked))))
    if asked.json_object is not None:
        schema = prepared_schema('{"type": "object"}', field, json_options(asked))
        return lark.text(lark.schema(schema))
    if asked.regex is not None:
        return lark.text(lark.regex(asked.regex))
    if asked.choice is not None:
        return lark.text(" | ".join(map(quoted, dict.fromkeys(asked.choice))))
    if asked.grammar is not None:
        for schema in _schemas_in(asked.grammar, field):
            check_numbers(schema, field)
        return lark.text(lark.inner(as_lark(asked.grammar, field)))
    assert asked.structural_tag is not None
    tag = read_json_text(str(asked.structural_tag), field)
    return lark.text(structural_tag(lark, tag, field, json_options(asked)))


def json_options(asked: StructuredOutputsParams) -> JsonOptions:
    whitespace: str | None = asked.whitespace_pattern or WHITESPACE
    if asked.disable_any_whitespace:
        whitespace = None
    return JsonOptions(whitespace, asked.disable_additional_properties)


def check_size(field: str, *texts: str) -> None:
    for text in texts:
        check_unicode(text, field)
    num_bytes = sum([len(text.encode()) for text in texts])
    if num_bytes > MAX_BYTES:
        raise InvalidRequest(field, f"has {num_bytes} bytes; at most {MAX_BYTES} are accepted")


def _schemas_in(lark: str, field: str) -> Iterator[Any]:
    for found in _SCHEMA.finditer(lark):
        try:
            yield JSONDecoder().raw_decode(lark, found.end())[0]
        except (ValueError, RecursionError):
            raise InvalidRequest(field, "has no JSON schema behind %json") from None


def as_lark(text: str, field: str) -> str:
    """A grammar in either notation. Whoever has a rule `start:` writes Lark's, as vLLM takes it."""
    notations = import_module("llguidance.gbnf_to_lark")
    if notations.is_lark_syntax(text):
        return text
    if len(text) > MAX_GBNF:
        words = f"in llama.cpp's notation; at most {MAX_GBNF} are accepted in it"
        raise InvalidRequest(field, f"has {len(text)} characters {words}")
    try:
        lark: str = notations.gbnf_to_lark(text)
    except RecursionError:
        raise InvalidRequest(field, "is nested too deeply") from None
    except Exception as error:  # it raises bare ones
        raise InvalidRequest(field, f"is no grammar: {error!s:.120}") from None
    return lark


def _source(asked: StructuredOutputsParams) -> str:
    texts = (asked.json, asked.regex, asked.grammar, asked.structural_tag)
    return "".join([text for text in texts if isinstance(text, str)])
