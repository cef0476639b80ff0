"""Reasoning before an answer, and special tokens in it."""

import pytest
from dialects.answers import TOOLS, parsed, parsed_alike

from duetto.dialects.answer import answer_parser, markers_of
from duetto.dialects.hermes import HERMES
from duetto.dialects.pieces import CallArguments, CallEnd, CallStart, Content, Reasoning
from duetto.dialects.reasoning import (
    DEEPSEEK_R1,
    GEMMA_REASONING,
    GRANITE_REASONING,
    HARMONY_REASONING,
    MISTRAL_REASONING,
    SEED_REASONING,
    THINK,
)


def pieces_of(text, reasoning=THINK, calls=None, **options):
    return parsed_alike(lambda: answer_parser(calls, reasoning, TOOLS, **options), text)


@pytest.mark.parametrize(
    ("reasoning", "text"),
    [
        (THINK, "<think>\nhm, <b>\n</think>\n\nyes."),
        (DEEPSEEK_R1, "hm, <b>\n</think>\n\nyes."),
        (DEEPSEEK_R1, "<think>\nhm, <b>\n</think>\n\nyes."),
        (MISTRAL_REASONING, "[THINK]hm, <b>[/THINK]yes."),
        (SEED_REASONING, "\n<seed:think>hm, <b></seed:think>yes."),
        (GEMMA_REASONING, "<|channel>thought\nhm, <b>\n<channel|>yes."),
        (GRANITE_REASONING, "Here is my thought process: hm, <b>\nHere is my response:\nyes."),
        (GRANITE_REASONING, "Here's my thought process: hm, <b>\nHere's my response:\nyes."),
        (
            HARMONY_REASONING,
            "<|channel|>analysis<|message|>hm, <b><|end|>yes.",
        ),
    ],
)
@pytest.mark.parametrize("calls", [None, HERMES], ids=["alone", "with calls"])
def test_reasoning_and_answer(reasoning, text, calls):
    if reasoning is HARMONY_REASONING:
        calls = None
    assert pieces_of(text, reasoning, calls) == [Reasoning("hm, <b>"), Content("yes.")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  plain ", [Content("  plain ")]),
        ("<think>\n\n</think>\n\nyes", [Content("yes")]),
        ("<think>cut </thin", [Reasoning("cut </thin")]),
        ("a <think>b</think>", [Content("a <think>b</think>")]),
        ("hm</think>yes", [Content("hm</think>yes")]),
    ],
)
def test_with_and_without_the_markers(text, expected):
    assert pieces_of(text) == expected


def test_a_template_that_has_opened_it():
    prompt = "<user>hi<assistant><think>\n"
    assert THINK.is_open(prompt)
    assert not THINK.is_open(prompt + "\n</think>\n\n")
    assert DEEPSEEK_R1.is_open("<user>hi<assistant>")
    expected = [Reasoning("hm"), Content("yes")]
    assert pieces_of("hm\n</think>\nyes", is_open=True) == expected
    assert pieces_of("<think>hm</think>yes", is_open=True) == expected
    assert pieces_of("hm", is_open=True) == [Reasoning("hm")]


def test_calls_come_behind_reasoning_and_not_in_it():
    call = '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
    assert pieces_of(f"<think>I write {call}.</think>\n\n{call}", calls=HERMES) == [
        Reasoning(f"I write {call}."),
        CallStart(0, "get"),
        CallArguments(0, "{}"),
        CallEnd(0),
    ]


def test_nothing_known_is_content():
    assert parsed(lambda: answer_parser(None, None), ["a", " <think>\n"]) == [
        Content("a <think>\n")
    ]


def test_special_tokens_are_dropped_but_for_markers():
    special = ["<|a|>", "<|a|>b", "<|ab|>", "<tool_call>", "<think>", "</think>"]
    call = '<tool_call>{"name": "get", "arguments": {"a": "<|a|>"}}</tool_call>'
    text = f"<think>x<|a|></think>y <|a|>bz<|ab|>.{call}<|a"
    assert pieces_of(text, calls=HERMES, special_tokens=special) == [
        Reasoning("x"),
        Content("y z."),
        CallStart(0, "get"),
        CallArguments(0, '{"a": "<|a|>"}'),
        CallEnd(0),
        Content("<|a"),
    ]


def test_what_a_parser_has_to_see():
    assert markers_of(HERMES, THINK) == ("<tool_call>", "</tool_call>", "<think>", "</think>")
    assert markers_of(None, None) == ()


def test_a_special_token_is_not_made_of_two_pieces():
    text = "<think>x<|</think>a|>"
    expected = [Reasoning("x<|"), Content("a|>")]
    assert pieces_of(text, special_tokens=["<|a|>"]) == expected
