"""Chat completions with tools and reasoning: what is called, streamed and whole."""

import json

import pytest
from server.fakes_server import MODEL, SpeakingExecutor, chunks, make_app, post
from server.speaking import saying
from starlette.testclient import TestClient

CHAT = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Riga", "days": 2}}\n</tool_call>'
ARGUMENTS = {"city": "Riga", "days": 2}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "what it will be like",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASK = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Will it rain in Riga?"}],
    "tools": [WEATHER],
}


def choice_of(client, **more):
    (choice,) = post(client, CHAT, {**ASK, **more})["choices"]
    return choice


def test_a_call_is_no_content_but_a_call():
    with saying("One moment. " + CALL) as client:
        choice = choice_of(client)
    message = choice["message"]
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert message["content"].strip() == "One moment."
    assert choice["finish_reason"] == "tool_calls"


def test_a_call_alone_has_no_content():
    with saying(CALL) as client:
        assert choice_of(client)["message"]["content"] is None


def test_a_stream_says_the_same_in_parts():
    with saying("One moment. " + CALL) as client:
        events = chunks(client, CHAT, ASK)
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    parts = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    first, *others = parts
    assert first["id"].startswith("call_") and first["function"]["name"] == "weather"
    assert {part["index"] for part in parts} == {0} and len(others) > 2
    assert not any("id" in part for part in others)
    arguments = "".join(part["function"].get("arguments") or "" for part in parts)
    assert json.loads(arguments) == ARGUMENTS
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == "One moment."
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_each_of_several_answers_has_its_own_calls():
    with saying(CALL) as client:
        choices = post(client, CHAT, {**ASK, "n": 3})["choices"]
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in choices]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("more", [{"tools": []}, {"tool_choice": "none"}])
def test_where_nothing_may_be_called_all_is_content(more):
    with saying(CALL) as client:
        choice = choice_of(client, **more)
    assert choice["message"]["content"] == CALL and not choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop"


def test_a_name_that_is_none_of_the_tools_is_content():
    with saying(CALL.replace("weather", "whether")) as client:
        choice = choice_of(client)
    assert "whether" in choice["message"]["content"] and choice["finish_reason"] == "stop"


def test_a_call_that_the_limit_cuts_off_ends_for_length():
    with saying(CALL) as client:
        choice = choice_of(client, max_tokens=60)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city"')


def test_reasoning_is_apart_from_content():
    with saying("<think>\nRiga is far.\n</think>\n\nNo.") as client:
        reply = post(client, CHAT, {**ASK, "tools": []})
        hidden = post(client, CHAT, {**ASK, "tools": [], "include_reasoning": False})
        events = chunks(client, CHAT, {**ASK, "tools": []})
    message = reply["choices"][0]["message"]
    assert message["content"] == "No."
    assert message["reasoning_content"] == message["reasoning"] == "Riga is far."
    details = reply["usage"]["completion_tokens_details"]
    assert 10 <= details["reasoning_tokens"] <= 30
    assert not hidden["choices"][0]["message"]["reasoning_content"]
    assert hidden["choices"][0]["message"]["content"] == "No."
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    assert thought == "Riga is far."


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
            "tools[0].function.x",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(more, field):
    with saying("x") as client:
        reply = client.post(CHAT, json={**ASK, **more})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(field)


def test_without_a_dialect_tools_are_refused_in_words():
    app, _ = make_app(SpeakingExecutor("x"))
    with TestClient(app) as client:
        reply = client.post(CHAT, json=ASK)
    assert reply.status_code == 400 and "--tool-call-parser" in reply.json()["error"]["message"]


def test_a_completion_has_no_tools():
    with saying("x") as client:
        body = {"model": MODEL, "prompt": "a", "tools": [WEATHER]}
        reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"
