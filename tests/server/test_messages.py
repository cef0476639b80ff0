"""Anthropic's Messages: bodies, events, errors, keys."""

import json

import pytest
from server.fakes_server import CODEC, MODEL, SpeakingExecutor, make_app, post
from server.speaking import named_events, saying
from starlette.testclient import TestClient

from duetto.core.errors import InvalidRequest

PATH = "/v1/messages"
ASK = {"model": MODEL, "max_tokens": 200, "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"name": "weather", "description": "w", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Riga"}}\n</tool_call>'


def events_of(client, body):
    return named_events(client, PATH, body)


def test_a_text_is_a_message_with_one_block():
    with saying("Hi there") as client:
        reply = post(client, PATH, ASK)
    assert reply["type"] == "message" and reply["role"] == "assistant"
    assert reply["id"].startswith("msg_") and reply["model"] == MODEL
    assert reply["content"] == [{"type": "text", "text": "Hi there"}]
    assert reply["stop_reason"] == "end_turn" and reply["stop_sequence"] is None
    usage = reply["usage"]
    assert usage["output_tokens"] == 9 and usage["cache_read_input_tokens"] == 0
    assert usage["input_tokens"] > 0


def test_what_is_found_in_the_cache_is_counted_apart():
    with saying("Hi") as client:
        first = post(client, PATH, ASK)["usage"]
        second = post(client, PATH, ASK)["usage"]
    assert second["cache_read_input_tokens"] > 0
    total = second["input_tokens"] + second["cache_read_input_tokens"]
    assert total == first["input_tokens"]


@pytest.mark.parametrize(
    ("more", "reason", "sequence"),
    [
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["the"]}, "stop_sequence", "the"),
    ],
)
def test_why_it_ended(more, reason, sequence):
    with saying("Hi there") as client:
        whole = post(client, PATH, {**ASK, **more})
        delta = events_of(client, {**ASK, **more})[-2]
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_stream_opens_adds_to_and_closes_each_block():
    thought = "<think>\nfar\n</think>\n\nWell. "
    with saying(thought + CALL) as client:
        events = events_of(client, {**ASK, "tools": [TOOL]})
    names = [event["type"] for event in events]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    starts = [e for e in events if e["type"] == "content_block_start"]
    assert [s["index"] for s in starts] == [0, 1, 2]
    assert [s["content_block"]["type"] for s in starts] == ["thinking", "text", "tool_use"]
    assert names.count("content_block_stop") == 3
    depth = 0
    for name in names:
        depth += (name == "content_block_start") - (name == "content_block_stop")
        assert 0 <= depth <= 1
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    said = {
        kind: "".join(d.get(key, "") for d in deltas)
        for kind, key in (("t", "text"), ("r", "thinking"), ("a", "partial_json"))
    }
    assert said["t"].strip() == "Well." and said["r"] == "far"
    assert json.loads(said["a"]) == {"city": "Riga"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] > 20


def test_a_call_is_a_block_of_its_own_and_its_result_comes_back():
    with saying(CALL) as client:
        reply = post(client, PATH, {**ASK, "tools": [TOOL]})
        (block,) = reply["content"]
        assert reply["stop_reason"] == "tool_use"
        assert block["type"] == "tool_use" and block["input"] == {"city": "Riga"}
        result = {"type": "tool_result", "tool_use_id": block["id"], "content": "rain"}
        turns = [
            *ASK["messages"],
            {"role": "assistant", "content": [block]},
            {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
        ]
        assert post(client, PATH, {**ASK, "tools": [TOOL], "messages": turns})["content"]


def test_tokens_are_counted_without_running():
    with saying("x") as client:
        count = post(client, f"{PATH}/count_tokens", {"model": MODEL, "messages": ASK["messages"]})
        usage = post(client, PATH, ASK)["usage"]
        longer = {"model": MODEL, "system": "Be kind.", "messages": ASK["messages"]}
        more = post(client, f"{PATH}/count_tokens", longer)
    assert count == {"input_tokens": usage["input_tokens"]}
    assert more["input_tokens"] > count["input_tokens"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, "context_m"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"colour": "red"}, "colour"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)
def test_refusals_have_anthropic_s_shape_and_name_the_field(more, field):
    body = {name: value for name, value in {**ASK, **more}.items() if value is not None}
    with saying("x") as client:
        reply = client.post(PATH, json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].startswith(field), error


def test_keys_come_by_anthropic_s_header_and_errors_in_its_shape():
    with saying("x", api_keys=("secret",)) as client:
        bare = client.post(PATH, json=ASK)
        with_key = client.post(PATH, json=ASK, headers={"x-api-key": "secret"})
        bearer = client.post(PATH, json=ASK, headers={"authorization": "Bearer secret"})
        unknown = client.post(PATH, json={**ASK, "model": "x"}, headers={"x-api-key": "secret"})
    assert bare.status_code == 401
    assert bare.json()["error"]["type"] == "authentication_error"
    assert with_key.status_code == bearer.status_code == 200
    assert unknown.status_code == 404 and unknown.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "x": "y"}])
def test_a_thread_is_refused_with_the_code_that_lets_clients_go_on_without(thread):
    with saying("Hi") as client:
        reply = client.post(PATH, json={**ASK, "thread": thread})
        assert client.post(PATH, json={**ASK, "thread": None}).status_code == 200
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"].startswith("thread: is not supported")
    assert error["details"] == {"error_code": "thread_unsupported_request"}


def read_by(reads):
    """A codec whose template reads these arguments; each that it was rendered with."""
    seen = []

    class Reader(type(CODEC)):
        def render_chat(self, messages, *, template_kwargs=None, **more):
            if unread := set(template_kwargs) - {*reads}:
                raise InvalidRequest("chat_template_kwargs", f"{unread} is not read")
            seen.append(template_kwargs)
            return super().render_chat(messages, **more)

    return Reader(), seen


CLAUDE_CODE = {  # what 2.1 sends with every turn
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "messages": [*ASK["messages"], {"role": "system", "content": [{"type": "text", "text": "x"}]}],
}


@pytest.mark.parametrize(
    ("reads", "expected"), [((), {}), (("reasoning_effort",), {"reasoning_effort": "high"})]
)
def test_what_is_usual_needs_nothing_of_the_template(reads, expected):
    codec, seen = read_by(reads)
    with saying("Hi", codec=codec) as client:
        assert post(client, PATH, {**ASK, **CLAUDE_CODE})["content"][0]["text"] == "Hi"
    assert seen[-1] == expected


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"effort": "medium"}}, "output_config.effort"),
        (
            {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"a": 1}},
            "chat_template_kwargs",
        ),
    ],
)
def test_what_a_template_cannot_do_is_refused_by_the_callers_name(more, field):
    app, _ = make_app(SpeakingExecutor("Hi"), codec=read_by(())[0])  # which does not reason
    with TestClient(app) as client:
        replies = [
            client.post(PATH, json={**ASK, **more}),
            client.post(
                f"{PATH}/count_tokens", json={"model": MODEL, "messages": ASK["messages"], **more}
            ),
        ]
    if "chat_template_kwargs" in more:  # which is not for a count
        replies.pop()
    for reply in replies:
        assert reply.status_code == 400
        assert reply.json()["error"]["message"].startswith(f"{field}: ")
        assert "enable_thinking" not in reply.text


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        (("enable_thinking",), {"enable_thinking": True}),
        (("thinking",), {"thinking": True}),
        ((), {}),  # of a model that always does
    ],
)
def test_thinking_is_turned_on_as_the_template_calls_it(reads, expected):
    codec, seen = read_by(reads)
    with saying("Hi", codec=codec) as client:
        post(client, PATH, {**ASK, "thinking": {"type": "enabled", "budget_tokens": 1024}})
    assert seen[-1] == expected


@pytest.mark.parametrize(("kind", "told"), [("enabled", False), ("disabled", True)])
def test_thinking_and_the_templates_arguments_must_agree(kind, told):
    for name in ("enable_thinking", "thinking"):
        with saying("Hi") as client:
            more = {"thinking": {"type": kind}, "chat_template_kwargs": {name: told}}
            reply = client.post(PATH, json={**ASK, **more})
        words = f"thinking.type: {kind!r} contradicts chat_template_kwargs.{name}: "
        assert reply.json()["error"]["message"].startswith(words)


def told_the_model(more):
    """The prompt of a conversation, from a codec that writes all of its messages."""
    seen = []

    class Writer(type(CODEC)):
        def render_chat(self, messages, *, tools=(), **more):
            seen.append((messages, tools))
            return super().render_chat(messages, tools=tools, **more)

    with saying("Hi", codec=Writer()) as client:
        post(client, PATH, {**ASK, **more})
    return seen[-1]


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ({"content": "no such city", "is_error": True}, "Error: no such city"),
        ({"content": [{"type": "text", "text": "no"}], "is_error": True}, "Error: no"),
        ({"is_error": True}, "Error"),
        ({"content": "9 C", "is_error": False}, "9 C"),
        ({"content": "9 C", "is_error": None}, "9 C"),
    ],
    ids=str,
)
def test_the_model_is_told_of_a_call_that_failed(result, shown):
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    turns = [
        *ASK["messages"],
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", **result}]},
    ]
    messages, _ = told_the_model({"messages": turns, "tools": [TOOL]})
    assert messages[-1] == {"role": "tool", "tool_call_id": "t1", "content": shown}


def test_the_model_is_shown_the_examples_of_a_tool():
    examples = [{"city": "Rīga"}, {"city": "Oslo"}]
    _, (with_text, alone) = told_the_model(
        {
            "tools": [
                {**TOOL, "input_examples": examples},
                {"name": "b", "input_schema": {}, "input_examples": examples[:1]},
            ]
        }
    )
    shown = 'Examples of its input:\n{"city": "Rīga"}'
    assert with_text["function"]["description"] == f'w\n\n{shown}\n{{"city": "Oslo"}}'
    assert alone["function"]["description"] == shown


def test_thinking_that_cannot_be_read_is_refused():
    def asked(data):
        block = {"type": "redacted_thinking", "data": data}
        said = {"role": "assistant", "content": [block, {"type": "text", "text": "x"}]}
        return {**ASK, "messages": [*ASK["messages"], said, *ASK["messages"]]}

    with saying("Hi") as client:
        reply = client.post(PATH, json=asked("Z2VoZWlt"))
        post(client, PATH, asked(""))
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.startswith("messages[1].content[0].type: redacted_thinking cannot be read")


def test_an_assistants_message_at_the_end_begins_the_answer():
    begun = [*ASK["messages"], {"role": "assistant", "content": "Hel"}]
    counted = {"model": MODEL, "messages": begun}
    with saying("lo") as client:
        reply = post(client, PATH, {**ASK, "messages": begun})
        count = post(client, f"{PATH}/count_tokens", counted)
    assert reply["content"] == [{"type": "text", "text": "lo"}]
    assert reply["usage"]["input_tokens"] == len("user: Hello\nassistant: Hel")
    assert count["input_tokens"] == reply["usage"]["input_tokens"]


BLOCKS = "text, tool_use, tool_result, thinking, redacted_thinking"


def in_message(block):
    return {"messages": [{"role": "user", "content": [block]}]}


def test_a_refused_value_is_followed_by_what_this_api_accepts():
    image = {"type": "image", "source": {"type": "url", "url": "x"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image]}
    for more, accepted in (
        ({"messages": [{"role": "tool", "content": "x"}]}, "assistant, system, user"),
        ({"tools": [{**TOOL, "type": "web_search_20250305"}]}, "custom"),
        (in_message(image), BLOCKS),
        (in_message(result), "text"),
        ({"system": [image]}, "text"),
        ({"service_tier": "priority"}, "auto, standard_only"),
        ({"tool_choice": {"type": "required"}}, "any, auto, none, tool"),
        ({"thinking": {"type": "on"}}, "adaptive, disabled, enabled"),
        ({"output_config": {"format": {"type": "xml"}}}, "json_schema"),
    ):
        with saying("x") as client:
            reply = client.post(PATH, json={**ASK, **more})
        message = reply.json()["error"]["message"]
        assert message.endswith(f"is not supported in this version; accepted: {accepted}")


def test_what_is_not_counted_is_told_to_be_the_other_routes():
    counted = {"model": MODEL, "messages": ASK["messages"]}
    with saying("x") as client:
        for field, route in (
            ("max_tokens", "/v1/messages"),
            ("stop_sequences", "/v1/messages"),
            ("logprobs", "/v1/chat/completions"),
        ):
            reply = client.post(f"{PATH}/count_tokens", json={**counted, field: 1})
            words = f"{field}: is not a known field; it is one of {route}"
            assert reply.json()["error"]["message"] == words
