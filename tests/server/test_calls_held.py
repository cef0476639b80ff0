"""Calls of tools that a grammar holds to their schema: a random model at temperature 1.5."""

import json
from dataclasses import replace

import jsonschema
import pytest
from server.fakes_server import post
from starlette.testclient import TestClient

from duetto import LLM, InvalidRequest, SamplingParams
from duetto.build import build
from duetto.core.engine_args import EngineArgs
from duetto.engine.read_answer import gathered
from duetto.engine.thread import in_thread
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

TEMPLATE = """{%- if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}
{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endfor %}a:"""
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["city"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": SCHEMA, "now": NOW}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "tools": TOOLS,
    "temperature": 1.5,
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def client(tiny_model, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    args = EngineArgs(max_model_len=1024, max_num_seqs=8, chat_template=str(template))
    built = build(tiny_model, args)
    assert built.speech.dialects.calls.name == "hermes"
    app = create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=ServerSettings(served_model_name="tiny"),
        grammars=built.grammars,
        speech=built.speech,
    )
    with TestClient(app) as made:
        yield made


def check(choice, *, names=tuple(SCHEMAS)):
    assert choice["finish_reason"] == "tool_calls", choice
    calls = choice["message"]["tool_calls"]
    assert calls and choice["message"]["content"] is None
    for call in calls:
        assert call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, SCHEMAS[call["function"]["name"]])
    return calls


def test_required_calls_always_parse(client):
    for choice in post(client, "/v1/chat/completions", {**ASK, "tool_choice": "required", "n": 6})[
        "choices"
    ]:
        check(choice)


def test_a_named_tool_is_the_one_that_is_called(client):
    named = {"type": "function", "function": {"name": "now"}}
    body = {**ASK, "tool_choice": named, "parallel_tool_calls": False, "n": 3}
    for choice in post(client, "/v1/chat/completions", body)["choices"]:
        (call,) = check(choice, names=("now",))
        assert json.loads(call["function"]["arguments"]) == {}


def test_what_the_model_opens_by_itself_is_held_too(client):
    """A model that says only the marker: from there on it must call."""
    opened = {**ASK, "messages": [{"role": "user", "content": "go"}], "n": 2, "seed": 1}
    body = {**opened, "logit_bias": {}, "tool_choice": "auto", "max_tokens": 40}
    for choice in post(client, "/v1/chat/completions", body)["choices"]:
        for call in choice["message"]["tool_calls"]:
            if choice["finish_reason"] != "length":
                json.loads(call["function"]["arguments"])


def test_either_calls_or_the_format(client):
    only = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    output = {"type": "json_schema", "json_schema": {"name": "x", "schema": only}}
    body = {**ASK, "response_format": output, "n": 6}
    for choice in post(client, "/v1/chat/completions", body)["choices"]:
        message = choice["message"]
        if message["tool_calls"]:
            check(choice)
        elif choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(message["content"]), only)


def test_messages_and_responses_hold_them_as_well(client):
    tools = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
    body = {"model": "tiny", "max_tokens": 200, "temperature": 1.0, "messages": ASK["messages"]}
    reply = post(client, "/v1/messages", {**body, "tools": tools, "tool_choice": {"type": "any"}})
    assert reply["stop_reason"] == "tool_use"
    for block in reply["content"]:
        jsonschema.validate(block["input"], SCHEMAS[block["name"]])
    functions = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked = {"model": "tiny", "input": "hello", "temperature": 1.5, "max_output_tokens": 200}
    reply = post(client, "/v1/responses", {**asked, "tools": functions, "tool_choice": "required"})
    assert reply["status"] == "completed" and reply["output"]
    for item in reply["output"]:
        jsonschema.validate(json.loads(item["arguments"]), SCHEMAS[item["name"]])


def test_a_schema_that_is_not_supported_is_refused_where_it_must_be_followed(client):
    odd = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64"}}}
    odd["unevaluatedProperties"] = False
    tool = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    body = {**ASK, "tools": [tool], "max_tokens": 8}
    free = client.post("/v1/chat/completions", json=body)
    assert free.status_code == 200
    held = client.post("/v1/chat/completions", json={**body, "tool_choice": "required"})
    assert (
        held.status_code == 400 and held.json()["error"]["param"] == "tools[0].function.parameters"
    )


IMPOSSIBLE = {"type": "object", "required": ["x"], "properties": {"x": {"enum": []}}}
OUTPUT = {"type": "json_schema", "name": "x", "schema": IMPOSSIBLE}
CHAT = {"model": "tiny", "messages": ASK["messages"]}
RESPONSE = {"model": "tiny", "input": "hello"}
MESSAGE = {**CHAT, "max_tokens": 8}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema",
         "json_schema": {"name": "x", "schema": IMPOSSIBLE}}},
         "response_format.json_schema.schema"),
        ("/v1/chat/completions", {**ASK, "response_format": {"type": "json_schema",
         "json_schema": {"name": "x", "schema": IMPOSSIBLE}}},
         "response_format.json_schema.schema"),
        ("/v1/chat/completions", {**CHAT, "tools": [TOOLS[1], {"type": "function", "function":
         {"name": "x", "parameters": IMPOSSIBLE}}]}, "tools[1].function.parameters"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "structured_outputs":
         {"json": IMPOSSIBLE}}, "structured_outputs.json"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "guided_json": IMPOSSIBLE},
         "guided_json"),
        ("/v1/responses", {**RESPONSE, "text": {"format": OUTPUT}}, "text.format.schema"),
        ("/v1/responses", {**RESPONSE, "tools": [{"type": "function", "name": "x",
         "parameters": IMPOSSIBLE}]}, "tools[0].parameters"),
        ("/v1/messages", {**MESSAGE, "output_config": {"format": {"type": "json_schema",
         "schema": IMPOSSIBLE}}}, "output_config.format.schema"),
        ("/v1/messages", {**MESSAGE, "output_format": {"type": "json_schema",
         "schema": IMPOSSIBLE}}, "output_format.schema"),
        ("/v1/messages", {**MESSAGE, "tools": [{"name": "x", "input_schema": IMPOSSIBLE}]},
         "tools[0].input_schema"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_that_allows_nothing_is_told_alike_everywhere(
    client, path, body, param, monkeypatch
):
    monkeypatch.setattr("duetto.grammars.compile.LOCATING_S", 600.0)

    def message(given):
        reply = client.post(path, json=given)
        assert reply.status_code == 400, reply.text
        return reply.json()["error"]["message"]

    assert message(body) == f"{param}: allows nothing: at #/properties/x, enum leaves no value"
    if not param.startswith("tools"):  # whose schemas are objects
        is_false = json.loads(json.dumps(body).replace(json.dumps(IMPOSSIBLE), "false"))
        assert message(is_false) == f"{param}: allows nothing: at # it is false"


def test_offline_a_message_has_its_calls(tiny_model, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    params = SamplingParams(temperature=1.5, max_tokens=200, seed=3, n=2)
    with LLM(tiny_model, chat_template=str(template), max_model_len=1024) as llm:
        (output,) = llm.chat(ASK["messages"], params, tools=TOOLS, tool_choice="required")
        (plain,) = llm.chat(ASK["messages"], SamplingParams(max_tokens=4))
        one = replace(params, n=1, seed=4)
        (whole,) = llm.chat(ASK["messages"], one, tools=TOOLS, tool_choice="required")
        streamed = [*llm.stream_chat(ASK["messages"], one, tools=TOOLS, tool_choice="required")]
        for choice in ("sometimes", {"type": "function", "function": {"name": "x"}}):
            with pytest.raises(InvalidRequest, match="tool_choice"):
                llm.chat(ASK["messages"], params, tools=TOOLS, tool_choice=choice)
    for answer in output.outputs:
        message = {**answer.message, "tool_calls": answer.message["tool_calls"]}
        check({"finish_reason": "tool_calls", "message": message})
    said = gathered([piece for _, pieces in streamed for piece in pieces])
    calls = [call["function"] for call in whole.outputs[0].message["tool_calls"]]
    assert [{"name": call.name, "arguments": call.arguments} for call in said.calls] == calls
    last = streamed[-1][0].outputs[0].message
    assert [call["function"] for call in last["tool_calls"]] == calls and len(streamed) > 3
    answer = plain.outputs[0]
    assert answer.message == {"role": "assistant", "content": answer.text}
