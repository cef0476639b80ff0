"""What may follow, compared with brute force: a token may if the text stays the beginning of one
that the grammar has. And the same whichever way a matcher has come."""

from itertools import product
from random import Random

import numpy as np
import pytest
from grammar_world import ENDS, SPECIAL, TOKENS, VOCABULARY, asked, make_grammars

from duetto.grammars.matcher import Matcher

GRAMMARS = make_grammars()
DIGITS = "0123456789"
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
# Constraints, and all texts that they allow.
LANGUAGES = {
    "choice": ({"choice": ["ab", "abab", "name", "null"]}, {"ab", "abab", "name", "null"}),
    "halves": ({"choice": ["世", "a世b"]}, {"世", "a世b"}),
    "regex": (
        {"regex": "^(ab|a)[0-2]{1,3}x?$"},
        {
            f"{a}{''.join(digits)}{x}"
            for a in ("ab", "a")
            for n in (1, 2, 3)
            for digits in product("012", repeat=n)
            for x in ("", "x")
        },
    ),
    "json": (
        {
            "json": {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "name": {"enum": ["ab", "x", None]}},
                "required": ["name"],
                "additionalProperties": False,
            },
            "disable_any_whitespace": True,
        },
        {
            f'{{{a}"name":{name}}}'
            for a in ("", '"a":true,', '"a":false,')
            for name in ('"ab"', '"x"', "null")
        },
    ),
    "numbers": (
        {"json": {"type": "integer", "minimum": -2, "maximum": 20}},
        {str(n) for n in range(-2, 21)} | {"-0"},
    ),
    "lark": (
        {"grammar": 'start: "x" NUMBER | "ab"\nNUMBER: /[0-9]/'},
        {"ab", *(f"x{digit}" for digit in DIGITS)},
    ),
    "gbnf": (
        {"grammar": 'root ::= "x" number | "ab"\nnumber ::= [0-9]'},
        {"ab", *(f"x{digit}" for digit in DIGITS)},
    ),
}


def beginnings(texts: set[str]) -> set[bytes]:
    return {text.encode()[:n] for text in texts for n in range(len(text.encode()) + 1)}


def expected(texts: set[bytes], starts: set[bytes], so_far: bytes) -> set[int]:
    """By trying each token."""
    found = {
        i
        for i, token in enumerate(TOKENS)
        if token and i not in SPECIAL.values() and so_far + token in starts
    }
    return found | set(ENDS if so_far in texts else ())


@pytest.mark.parametrize("name", LANGUAGES)
def test_masks_are_those_of_brute_force(name):
    constraint, language = LANGUAGES[name]
    texts, starts = {text.encode() for text in language}, beginnings(language)
    grammar = GRAMMARS.make(asked(**constraint))
    for seed in range(12):
        rng, matcher, tokens = Random(seed), GRAMMARS.matcher(grammar), list[int]()
        while True:
            assert matcher.seek(tokens)
            may = expected(texts, starts, b"".join(TOKENS[i] for i in tokens))
            assert set(np.flatnonzero(matcher.allowed()).tolist()) == may
            ceiling = matcher.ceiling()
            assert ceiling.dtype == np.float32 and len(ceiling) == len(TOKENS)
            assert set(np.flatnonzero(ceiling > 0).tolist()) == may
            assert np.isinf(ceiling).all()
            token_id = rng.choice(sorted(may))
            if token_id in ENDS:
                break
            tokens.append(token_id)


def drawn(matcher: Matcher, rng: Random, most: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < most and matcher.seek(tokens):
        token_id = rng.choice(np.flatnonzero(matcher.allowed()).tolist())
        if token_id in ENDS:
            break
        tokens.append(token_id)
    return tokens


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_object": True},
        {"json": {"type": "array", "items": {"type": ["string", "number"]}}},
        {"regex": "([a-z]+ ?)*=[0-9]{3,}"},
    ],
    ids=str,
)
def test_whichever_way_it_has_come(constraint):
    """Back and forth between the beginnings of several answers, as drafts and preemptions do."""
    rng, grammar = Random(7), GRAMMARS.make(asked(**constraint))
    answers = [drawn(GRAMMARS.matcher(grammar), rng, 25) for _ in range(5)]
    wanderer = GRAMMARS.matcher(grammar)
    for _ in range(60):
        answer = rng.choice(answers)
        tokens = answer[: rng.randint(0, len(answer))]
        fresh = GRAMMARS.matcher(grammar)
        assert wanderer.seek(tokens) and fresh.seek(tokens)
        assert wanderer.allowed().tolist() == fresh.allowed().tolist()
        assert wanderer.shortest_end(60) == fresh.shortest_end(60)
        assert wanderer.allowed().tolist() == fresh.allowed().tolist(), "the search left a trace"


def test_an_answer_that_is_none_is_told(tmp_path):
    matcher = GRAMMARS.matcher(GRAMMARS.make(asked(choice=["ab", "ac"])))
    a, b, c = (TOKENS.index(letter) for letter in (b"a", b"b", b"c"))
    assert not matcher.seek([b])
    assert matcher.seek([a, c])
    assert not matcher.seek([a, c, c])
    assert not matcher.seek([a, ENDS[0]]), "behind an end nothing is sampled"
    assert matcher.seek([a, b])
    assert set(np.flatnonzero(matcher.allowed()).tolist()) == set(ENDS)


def text(token_ids: tuple[int, ...] | None) -> str | None:
    return None if token_ids is None else b"".join(TOKENS[i] for i in token_ids).decode()


@pytest.mark.parametrize(
    ("constraint", "begun", "end"),
    [
        ({"json_object": True}, "", "{}"),
        ({"json_object": True}, '{"a', '":false}'),
        ({"json": {"type": "string"}}, '"ab', '"'),
        ({"json": {"type": "array", "items": {"type": "array"}}}, '[[["a', '"]]]'),
        ({"regex": "(ab)*x"}, "ab", "abx"),  # not the shortest, and no circle
        ({"json": ENDLESS}, "", None),
    ],
    ids=str,
)
def test_ends_that_are_found(constraint, begun, end):
    matcher = GRAMMARS.matcher(GRAMMARS.make(asked(**constraint)))
    tokens = [TOKENS.index(character.encode()) for character in begun]
    assert matcher.seek(tokens)
    assert text(matcher.shortest_end(60)) == end
    if end:
        assert matcher.shortest_end(0) is None


def test_steering_takes_the_end_that_just_fits():
    matcher = GRAMMARS.matcher(GRAMMARS.make(asked(json={"type": "array"})))
    bracket, close = TOKENS.index(b"["), TOKENS.index(b"]")
    for num_left in range(2, 12):
        # Another bracket needs one that closes it: two tokens more, and the end of sequence.
        taken = matcher.steered([bracket], bracket, num_left)
        assert taken == (bracket if num_left >= 4 else close), num_left
    assert matcher.steered([bracket], bracket, 1) == bracket, "nothing fits: it is left as it is"
    assert matcher.steered([bracket, close], TOKENS.index(b" "), 1) in (TOKENS.index(b" "), 0)
    assert matcher.steered([bracket], bracket, 10_000) == bracket


def test_the_vocabulary_has_rows_without_a_token():
    assert VOCABULARY.tokens[100] == b"" and len(TOKENS) % 8, "padding is tried"
