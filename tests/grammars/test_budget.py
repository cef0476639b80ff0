"""Reasoning that is closed once its tokens are used up: what may follow, whichever way it came."""

from random import Random

import numpy as np
import pytest
from grammar_world import ENDS, THINK, THINK_END, TOKENS, make_grammars, text_of

from duetto.core.structured import ReasoningBudget
from duetto.grammars.tags import ReasoningMarks, json_content, reasoning_first

GRAMMARS = make_grammars()
SPECIAL = ReasoningMarks("<think>", "</think>", has_begun=True)
SPELT = ReasoningMarks("Z@", "Z/XT", has_begun=True)
HALF = TOKENS.index(b"\xe4\xb8")
SCHEMA = {"type": "object", "properties": {"a": {"enum": [7]}}, "additionalProperties": False}


def grammar(marks: ReasoningMarks, num_tokens: int, schema: dict | None = None):
    def start(lark):
        rest = lark.anything() if schema is None else json_content(lark, schema, "schema")
        return reasoning_first(lark, marks, rest)

    return GRAMMARS.write(start, "f")._replace(budget=ReasoningBudget(num_tokens, *marks))


def ids_of(matcher) -> list[int]:
    return np.flatnonzero(matcher.allowed()).tolist()


def walked(made, seed: int, length: int, avoid: tuple[int, ...] = ()) -> list[int]:
    """An answer drawn from the masks, which keeps to reasoning while it can; each of its masks is
    that of a matcher that comes back from elsewhere, and of one that begins there."""
    rng, matcher, tokens = Random(seed), GRAMMARS.matcher(made), list[int]()
    while len(tokens) < length:
        allowed = ids_of(matcher)
        fresh = GRAMMARS.matcher(made)
        assert fresh.seek(tokens) and ids_of(fresh) == allowed
        aside = rng.choice(allowed)
        if matcher.seek([*tokens, aside]):
            matcher.allowed()
        if set(allowed) <= set(ENDS):
            return tokens
        token_id = rng.choice([i for i in allowed if i not in (*avoid, *ENDS)] or allowed)
        tokens.append(token_id)
        assert matcher.seek(tokens)
    return tokens


@pytest.mark.parametrize("seed", range(5))
def test_a_marker_that_is_a_token_follows_the_last_one(seed):
    tokens = walked(grammar(SPECIAL, 5), seed, 12, avoid=(THINK_END, HALF))
    assert tokens.index(THINK_END) == 5


@pytest.mark.parametrize("seed", range(5))
def test_a_marker_that_is_spelt_follows_in_any_spelling(seed):
    text = text_of(walked(grammar(SPELT, 4), seed, 12, avoid=(TOKENS.index(b"Z"), HALF)))
    before, marker, _ = text.partition("Z/XT")
    assert marker and "Z" not in before


def test_what_has_begun_of_a_marker_is_gone_on_with():
    matcher = GRAMMARS.matcher(grammar(SPELT, 2))
    assert matcher.seek([TOKENS.index(b"a"), TOKENS.index(b"Z")])
    assert [TOKENS[i] for i in ids_of(matcher)] == [b"/"]


def test_a_character_is_ended_first():
    matcher = GRAMMARS.matcher(grammar(SPECIAL, 1))
    assert matcher.seek([HALF])
    assert [TOKENS[i] for i in ids_of(matcher)] == [b"\x96"]
    assert matcher.seek([HALF, TOKENS.index(b"\x96")]) and ids_of(matcher) == [THINK_END]


def test_no_tokens_at_all():
    assert ids_of(GRAMMARS.matcher(grammar(SPECIAL, 0))) == [THINK_END]


def test_reasoning_that_the_answer_opens():
    made = grammar(SPECIAL._replace(has_begun=False), 1)
    matcher, letter = GRAMMARS.matcher(made), TOKENS.index(b"a")
    assert matcher.seek([THINK, letter]) and ids_of(matcher) == [THINK_END]
    assert matcher.seek([letter, letter, letter]) and len(ids_of(matcher)) > 9


def test_reasoning_that_ends_of_itself_has_no_more_to_close():
    matcher, letter = GRAMMARS.matcher(grammar(SPECIAL, 3)), TOKENS.index(b"a")
    assert matcher.seek([letter, THINK_END, *[letter] * 9])
    assert {*ENDS, THINK} < set(ids_of(matcher))


def test_the_form_of_the_answer_follows():
    tokens = walked(grammar(SPECIAL, 3, SCHEMA), 1, 60, avoid=(THINK_END, HALF))
    assert tokens.index(THINK_END) == 3
    answer = text_of(tokens[4:]).strip()
    assert answer.startswith("{") and answer.endswith("}")


def test_what_must_follow_is_the_marker():
    made = grammar(SPELT, 1)
    matcher = GRAMMARS.matcher(made)
    assert matcher.seek([TOKENS.index(b"a")])
    assert text_of(matcher.what_must_follow(16)) == "Z/XT"


def test_the_shortest_end_closes_it_too():
    matcher = GRAMMARS.matcher(grammar(SPECIAL, 2, SCHEMA))
    assert matcher.seek([TOKENS.index(b"a")] * 2)
    assert matcher.shortest_end(20)[0] == THINK_END
