"""A vocabulary of 101 tokens in which JSON can be written, for the small models of the tests."""

from collections.abc import Sequence
from typing import Any

from small_models import VOCAB

from duetto.core.structured import StructuredOutputsParams, Vocabulary
from duetto.grammars.compile import CompiledGrammars

ENDS = (0, 99)  # two tokens that end a text
THINK, THINK_END, CALL = 97, 98, 96  # tokens that are no text
NO_TOKEN = (95, 100)  # rows of the model without a token

_CHARACTERS = [*'{}[]":,\\ \n-.+', *"0123456789", *"abcdefghijklmnopqrstuvwxyz", *"ATZX_/@é"]
_PIECES = [
    *('{"', '":', '",', '"}', '"]', '": "', '", "', "}}", "]}", "null", "true", "false", "[]"),
    *("{}", '""', "  ", "name", "age", "ab", "20", "00", "-0", "=", '"a', "</a>", "<a>", "x="),
]
_HALVES = [b"\xe4\xb8", b"\x96"]  # of one character
_TEXTS = [text.encode() for text in (*_CHARACTERS, *_PIECES)] + _HALVES


def _tokens() -> list[bytes]:
    tokens = [b"</s>", *_TEXTS]
    tokens += [b""] * (VOCAB - len(tokens))
    tokens[CALL], tokens[THINK], tokens[THINK_END] = b"<|call|>", b"<think>", b"</think>"
    tokens[99] = b"<|end|>"
    return tokens


TOKENS = _tokens()
SPECIAL = {"</s>": 0, "<|end|>": 99, "<|call|>": CALL, "<think>": THINK, "</think>": THINK_END}
VOCABULARY = Vocabulary(TOKENS, SPECIAL, frozenset(ENDS))
assert len(TOKENS) == VOCAB and not any(TOKENS[i] for i in NO_TOKEN)


def make_grammars() -> CompiledGrammars:
    return CompiledGrammars(lambda: VOCABULARY)


def asked(**constraint: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**constraint)


def text_of(token_ids: Sequence[int]) -> str:
    """Of an answer, without the token that ends it."""
    shown = [i for i in token_ids if i not in ENDS]
    return b"".join(TOKENS[i] for i in shown).decode(errors="replace")


def decode(token_ids: Sequence[int], skip: bool) -> str:
    shown = [i for i in token_ids if not skip or i not in SPECIAL.values()]
    return b"".join(TOKENS[i] for i in shown).decode(errors="replace")
