"""Hermes: JSON between two tags."""

import pytest
from dialects.answers import TOOLS, parsed_alike

from duetto.dialects.hermes import HERMES
from duetto.dialects.pieces import CallArguments, CallEnd, CallStart, Content
from duetto.dialects.words import Markers, Words

WEATHER = [
    CallStart(0, "get_weather"),
    CallArguments(0, '{"city": "Oslo"}'),
    CallEnd(0),
]


def pieces_of(text):
    return parsed_alike(lambda: HERMES.parser(TOOLS), text)


@pytest.mark.parametrize(
    "call",
    [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        '<tool_call>{"arguments":{"city": "Oslo"},"name":"get_weather"}</tool_call>',
        '<tool_call>{"id": "7", "name":"get_weather","parameters":{"city": "Oslo"}}</tool_call>',
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]</tool_call>',
    ],
)
def test_a_call(call):
    assert pieces_of(call) == WEATHER
    assert pieces_of(f"I look. \n{call}\n") == [Content("I look."), *WEATHER]


def test_a_closing_tag_that_is_cut_off():
    assert (
        pieces_of('<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</to')
        == WEATHER
    )


def test_two_calls_with_text_between_and_behind():
    one = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
    assert pieces_of(f"{one}\n and {one} done") == [
        CallStart(0, "get"),
        CallArguments(0, "{}"),
        CallEnd(0),
        Content("and"),
        CallStart(1, "get"),
        CallArguments(1, "{}"),
        CallEnd(1),
        Content("done"),
    ]


def test_a_name_alone_is_a_call_without_arguments():
    assert pieces_of('<tool_call>{"name": "get"}</tool_call>') == [
        CallStart(0, "get"),
        CallArguments(0, "{}"),
        CallEnd(0),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain \n",
        "a < b, <tool",
        "<tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get", "name": "get", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get", "arguments": []}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "get_wea',
        "<tool_call>" + " " * 70 + '{"name": "get"}</tool_call>',
    ],
)
def test_what_is_no_call_is_content(text):
    assert pieces_of(text) == ([Content(text)] if text else [])


def test_a_call_may_follow_what_was_none():
    no_call = '<tool_call>{"name": "oth'
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert pieces_of(no_call + call) == [Content(no_call), *WEATHER]


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ('{"a": [1, 2', '{"a": [1, 2', ""),
        ('{"a": [1, 2}}</tool_call>', '{"a": [1, 2', "}}</tool_call>"),
        ('{"a": "}</tool_call>', '{"a": "}</tool_call>', ""),
    ],
)
def test_arguments_that_break_or_are_cut_off(text, arguments, content):
    start = '<tool_call>{"name": "get", "arguments": '
    assert pieces_of(start + text) == [
        CallStart(0, "get"),
        CallArguments(0, arguments),
        CallEnd(0, is_complete=False),
        *([Content(content)] if content else []),
    ]


def test_arguments_come_as_they_are_written():
    parser = HERMES.parser(TOOLS)
    parser.push('<tool_call>{"name": "get", "arguments": {"a')
    assert parser.push('": "b') == [CallArguments(0, '": "b')]


def test_brackets_and_tags_within_strings_are_text():
    arguments = r'{"code": "if x: {[ \"</tool_call>\" \\"}'
    text = f'<tool_call>{{"name": "get", "arguments": {arguments}}}</tool_call>'
    assert pieces_of(text) == [CallStart(0, "get"), CallArguments(0, arguments), CallEnd(0)]


def test_white_space_beside_a_marker_is_part_of_it_up_to_a_bound():
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert pieces_of("x" + " " * 64 + call + "\n" * 64) == [Content("x"), *WEATHER]
    assert pieces_of("x" + " " * 66 + call) == [Content("x  "), *WEATHER]
    assert pieces_of(call + "\n" * 66) == [*WEATHER, Content("\n\n")]


def test_a_value_that_is_too_long_to_be_dropped():
    """What was read of it is content; what is behind is looked at."""
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    start = '<tool_call>{"id": "' + "x" * 256
    assert pieces_of(start + call) == [Content(start), *WEATHER]


def test_a_second_call_of_a_list_that_is_cut_off_is_content():
    first = '<tool_call>[{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    assert pieces_of(first + ', {"name": "ge') == [*WEATHER, Content(', {"name": "ge')]
    assert pieces_of(first) == WEATHER


def test_a_word_that_is_complete_waits_for_no_more():
    assert Words(["get", "get_weather"]).may_become("get")
    assert not Words(["get", "get_weather"]).may_become("get_weather")


@pytest.mark.parametrize("names", [["a", "b", "ab"], ["a", "a"], [""], ["<a>", "<a>b", "<"]])
def test_no_marker_begins_with_another(names):
    with pytest.raises(AssertionError):
        Markers(*names)
