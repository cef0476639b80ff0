"""Reasoning that is closed after so many tokens, by each API, on a real (random) model that seldom
closes it itself."""

import json

import pytest
from server.fakes_server import chunks, post
from starlette.testclient import TestClient

from duetto import LLM, InvalidRequest, SamplingParams
from duetto.build import build
from duetto.core.engine_args import EngineArgs
from duetto.engine.thread import in_thread
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

TEMPLATE = """{%- for message in messages %}
{{- message['role'] + ': ' + message['content'] + '\\n' }}
{%- endfor %}
{{- 'assistant: ' }}
{%- if enable_thinking is not defined or enable_thinking %}
{{- '<think>\\n' }}
{%- else %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
"""
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PLAIN = {"model": "tiny", "temperature": 1.5, "seed": 3}
SAID = [{"role": "user", "content": "hello"}]
ASK = {
    CHAT: {**PLAIN, "max_tokens": 60, "messages": SAID},
    RESPONSES: {**PLAIN, "max_output_tokens": 60, "input": "hello"},
    MESSAGES: {"model": "tiny", "temperature": 1, "max_tokens": 60, "messages": SAID, "seed": 3},
}
BUDGET = 12
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA}}
# The marker is spelt of bytes: at worst each of its characters is a token. And three end a
# character.
MOST = BUDGET + len("</think>") + 3


@pytest.fixture(scope="module")
def engine_args(tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "thinking.jinja"
    template.write_text(TEMPLATE)
    return EngineArgs(max_model_len=512, max_num_seqs=8, chat_template=str(template))


@pytest.fixture(scope="module")
def client(tiny_model, engine_args):
    built = build(tiny_model, engine_args)
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


def test_chat(client):
    free = post(client, CHAT, ASK[CHAT])["choices"][0]
    assert not free["message"]["content"] and free["finish_reason"] == "length"
    for more in ({"thinking_budget": BUDGET}, {"thinking_token_budget": BUDGET}):
        reply = post(client, CHAT, {**ASK[CHAT], **more})
        message, usage = reply["choices"][0]["message"], reply["usage"]
        assert message["content"] and "</think>" not in message["content"]
        # What it samples until then is what it samples without a budget.
        assert message["reasoning"] and free["message"]["reasoning"].startswith(
            message["reasoning"][:8]
        )
        assert BUDGET - 3 <= usage["completion_tokens_details"]["reasoning_tokens"] <= MOST


def test_a_stream_has_the_same(client):
    body = {**ASK[CHAT], "thinking_budget": BUDGET}
    whole = post(client, CHAT, body)["choices"][0]["message"]
    deltas = [c["choices"][0]["delta"] for c in chunks(client, CHAT, body) if c["choices"]]
    assert "".join([d.get("reasoning") or "" for d in deltas]) == whole["reasoning"]
    assert "".join([d.get("content") or "" for d in deltas]) == whole["content"]


def test_several_answers_have_a_budget_each(client):
    body = {**ASK[CHAT], "thinking_budget": BUDGET, "n": 3}
    choices = post(client, CHAT, body)["choices"]
    assert all(choice["message"]["content"] for choice in choices)
    assert len({choice["message"]["reasoning"] for choice in choices}) == 3


@pytest.mark.parametrize("budget", [0, BUDGET])
def test_json_comes_behind_it(client, budget):
    body = {**ASK[CHAT], "thinking_budget": budget, "response_format": FORMAT, "max_tokens": 90}
    choice = post(client, CHAT, body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert set(json.loads(choice["message"]["content"])) == {"ok"}
    assert bool(choice["message"]["reasoning"]) is bool(budget)


def test_responses(client):
    reply = post(client, RESPONSES, {**ASK[RESPONSES], "thinking_budget": BUDGET})
    assert [item["type"] for item in reply["output"]] == ["reasoning", "message"]
    assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] <= MOST


def test_messages(client):
    thinking = {"type": "enabled", "budget_tokens": BUDGET}
    reply = post(client, MESSAGES, {**ASK[MESSAGES], "thinking": thinking})
    thought, text = reply["content"]
    assert (thought["type"], text["type"]) == ("thinking", "text")
    assert thought["thinking"] and text["text"]


def test_without_reasoning_there_is_none_to_close(client):
    more = {"chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": BUDGET}
    message = post(client, CHAT, {**ASK[CHAT], **more})["choices"][0]["message"]
    assert message["content"] and not message["reasoning"]


@pytest.mark.parametrize(
    ("path", "more", "field"),
    [
        (CHAT, {"thinking_budget": -1}, "thinking_budget"),
        (CHAT, {"thinking_budget": "1"}, "thinking_budget"),
        (CHAT, {"thinking_token_budget": -2}, "thinking_token_budget"),
        (CHAT, {"thinking_budget": 1, "thinking_token_budget": 2}, "thinking_budget"),
        (CHAT, {"thinking_budget": 1, "ignore_eos": True}, "thinking_budget"),
        (CHAT, {"thinking_budget": 1, "structured_outputs": {"regex": "a"}}, "thinking_budget"),
        (RESPONSES, {"thinking_budget": -1}, "thinking_budget"),
        ("/v1/completions", {"thinking_budget": 1}, "thinking_budget"),
        (
            MESSAGES,
            {"thinking": {"type": "adaptive", "budget_tokens": 5}},
            "thinking.budget_tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused(client, path, more, field):
    body = {**ASK.get(path, {"model": "tiny", "prompt": "hello"}), **more}
    reply = client.post(path, json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert field in (error.get("param") or error["message"])


def test_offline(tiny_model, engine_args):
    asked = SamplingParams(max_tokens=60, temperature=1.5, seed=3, thinking_budget=BUDGET)
    with LLM(tiny_model, args=engine_args) as llm:
        (answer,) = llm.chat(SAID, asked, use_tqdm=False)
        assert answer.outputs[0].message["content"]
        assert answer.outputs[0].message["reasoning_content"]
        with pytest.raises(InvalidRequest, match="thinking_budget"):
            llm.generate("hello", asked, use_tqdm=False)
