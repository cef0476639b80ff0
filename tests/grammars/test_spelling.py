"""How a text that must follow is written in tokens."""

from random import Random

import numpy as np
import pytest
from grammar_world import THINK_END, TOKENS, VOCABULARY, asked, make_grammars, text_of

from duetto.grammars.spelling import Spelling


def test_the_longest_token_first():
    spelt = Spelling(VOCABULARY).of(b'"name": "', 16)
    assert [TOKENS[i] for i in spelt] == [b'"', b"name", b'": "']


def test_no_more_than_are_wanted():
    assert len(Spelling(VOCABULARY).of(b"qqqqqq", 4)) == 4


def test_a_token_that_is_no_text_is_itself():
    spelt = Spelling(VOCABULARY).of(b"ab\xff[98]x", 9)
    assert spelt == (TOKENS.index(b"ab"), THINK_END, TOKENS.index(b"x"))


def test_it_stops_where_no_token_begins():
    assert Spelling(VOCABULARY).of(b"ab\x00ab", 9) == (TOKENS.index(b"ab"),)


def test_what_must_follow_is_what_the_masks_allow():
    grammars = make_grammars()
    matcher = grammars.matcher(grammars.make(asked(regex="x=(nab|nabe)+")))
    first = matcher.what_must_follow(16)
    assert text_of(first) == "x=nab"
    for count in range(len(first)):
        assert matcher.seek(first[:count])
        assert matcher.allowed()[first[count]]
    assert matcher.seek(first) and not matcher.what_must_follow(16)
    assert matcher.seek(first[:1]) and matcher.what_must_follow(2) == first[1:3]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "exclusiveMaximum": 9},
        {"type": "array", "prefixItems": [{"type": "integer", "exclusiveMaximum": 9}]},
        {"type": "object", "properties": {"age": {"enum": [200, 20, "ab"]}}, "required": ["age"]},
    ],
    ids=str,
)
def test_being_asked_changes_no_mask(schema):
    grammars = make_grammars()
    made = grammars.make(asked(json=schema))
    for seed in range(6):
        rng, tokens = Random(seed), list[int]()
        was_asked, was_not = grammars.matcher(made), grammars.matcher(made)
        for _ in range(20):
            was_asked.what_must_follow(16)
            allowed = np.flatnonzero(was_not.allowed())
            assert (np.flatnonzero(was_asked.allowed()) == allowed).all()
            tokens.append(rng.choice(allowed.tolist()))
            if not was_not.seek(tokens):
                break
            was_asked.seek(tokens)
