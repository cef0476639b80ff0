"""Structured output over HTTP, by every name that clients have for it, on a real (random) model."""

import json
import logging
import re

import pytest
from server.fakes_server import chunks, post
from starlette.testclient import TestClient

from duetto import LLM, InvalidRequest, SamplingParams, StructuredOutputsParams
from duetto.build import build
from duetto.core.engine_args import EngineArgs
from duetto.engine.thread import in_thread
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
GBNF = 'root ::= "yes" | "no" [0-9]'
PLAIN = {"model": "tiny", "max_tokens": 48, "temperature": 1.5, "seed": 3}
PATHS = {
    "/v1/completions": {**PLAIN, "prompt": "def f(x):"},
    "/v1/chat/completions": {**PLAIN, "messages": [{"role": "user", "content": "hello"}]},
}
ENGINE = {"max_model_len": 512, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def client(tiny_model):
    built = build(tiny_model, EngineArgs(**ENGINE))
    app = create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=ServerSettings(served_model_name="tiny"),
        grammars=built.grammars,
    )
    with TestClient(app) as made:
        yield made


def text_of(choice):
    return choice["message"]["content"] if "message" in choice else choice["text"]


def is_record(text):
    found = json.loads(text)
    return set(found) == {"name", "ok"} and isinstance(found["ok"], bool)


def is_yes_or_no(text):
    return re.fullmatch("yes|no[0-9]", text) is not None


JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA}}
STRICT = {"type": "json_schema", "json_schema": {**JSON_SCHEMA["json_schema"], "strict": True}}
TAG = {"type": "structural_tag", "format": {"type": "regex", "pattern": "yes|no[0-9]"}}
WAYS = [
    ({"response_format": JSON_SCHEMA}, is_record),
    ({"response_format": STRICT}, is_record),
    ({"response_format": {"type": "json_object"}}, lambda t: isinstance(json.loads(t), dict)),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, is_record),
    ({"response_format": TAG}, is_yes_or_no),
    ({"structured_outputs": {"json": SCHEMA}}, is_record),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_record),
    ({"structured_outputs": {"regex": "yes|no[0-9]"}}, is_yes_or_no),
    ({"structured_outputs": {"choice": ["yes", "no1"]}}, is_yes_or_no),
    ({"structured_outputs": {"grammar": GBNF}}, is_yes_or_no),
    ({"guided_json": SCHEMA}, is_record),
    ({"guided_regex": "yes|no[0-9]"}, is_yes_or_no),
    ({"guided_choice": ["yes", "no1"]}, is_yes_or_no),
    ({"guided_grammar": GBNF}, is_yes_or_no),
    ({"grammar": GBNF}, is_yes_or_no),
    ({"json_schema": SCHEMA}, is_record),
    ({"regex": "yes|no[0-9]"}, is_yes_or_no),
    ({"ebnf": GBNF}, is_yes_or_no),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("way", "is_valid"), WAYS, ids=lambda value: getattr(value, "__name__", str(value)[:60])
)
def test_each_name_for_it_constrains(client, path, way, is_valid):
    (choice,) = post(client, path, {**PATHS[path], **way})["choices"]
    assert choice["finish_reason"] == "stop"
    assert is_valid(text_of(choice))


def test_an_older_name_is_logged(client, caplog):
    with caplog.at_level(logging.INFO):
        post(client, "/v1/completions", {**PATHS["/v1/completions"], "guided_regex": "yes"})
    assert "structured_outputs.regex" in caplog.text


@pytest.mark.parametrize("path", PATHS)
def test_streamed_it_is_the_same(client, path):
    body = {**PATHS[path], "response_format": JSON_SCHEMA}
    whole = text_of(post(client, path, body)["choices"][0])
    parts = [chunk["choices"][0] for chunk in chunks(client, path, body) if chunk["choices"]]
    shown = "".join(p.get("text") or p.get("delta", {}).get("content") or "" for p in parts)
    assert shown == whole and is_record(whole) and len(parts) > 3


def test_with_n_logprobs_and_echo(client):
    asked = {"n": 3, "logprobs": 2, "echo": True, "structured_outputs": {"json": SCHEMA}}
    choices = post(client, "/v1/completions", {**PATHS["/v1/completions"], **asked})["choices"]
    texts = {choice["text"].removeprefix("def f(x):") for choice in choices}
    assert len(texts) == 3 and all(map(is_record, texts))
    assert all(len(choice["logprobs"]["tokens"]) > 5 for choice in choices)


def test_a_stop_string_may_cut_it_short(client):
    body = {**PATHS["/v1/completions"], "structured_outputs": {"json": SCHEMA}, "stop": ":"}
    (choice,) = post(client, "/v1/completions", body)["choices"]
    assert choice["finish_reason"] == "stop" and ":" not in choice["text"]


def test_it_is_led_to_its_end(client):
    body = {**PATHS["/v1/completions"], "max_tokens": 30, "structured_outputs": {"json": SCHEMA}}
    for seed in range(6):
        (choice,) = post(client, "/v1/completions", {**body, "seed": seed})["choices"]
        assert choice["finish_reason"] == "stop" and is_record(choice["text"])


BAD = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "", "schema": {}}}},
         "response_format.json_schema.name", "characters"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}},
         "response_format.json_schema.schema", "#/properties/a/not"),
        ({"response_format": {"type": "text", "json_schema": JSON_SCHEMA["json_schema"]}},
         "response_format.json_schema", "text"),
        ({"response_format": {"type": "text", "triggers": ["a"]}}, "response_format.type", "tag"),
        ({"response_format": {"type": "json_object", "format": {}}}, "response_format.type", "tag"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {},
          "odd": 1}}}, "response_format.json_schema.odd", "not a known field"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        ({"structured_outputs": {"odd": 1}}, "structured_outputs.odd", "not a known field"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "choice"),
        ({"structured_outputs": {"json": BAD}}, "structured_outputs.json", "#/properties/a/not"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "str"),
        ({"guided_json": BAD}, "guided_json", "#/properties/a/not"),
        ({"guided_regex": "((("}, "guided_regex", "unclosed"),
        ({"grammar": "root ::= nowhere"}, "grammar", "nowhere"),
        ({"json_schema": {"$ref": "#/x"}}, "json_schema", "/x"),
        ({"regex": "a", "ebnf": GBNF}, "regex", "ebnf"),
        ({"guided_json": SCHEMA, "response_format": JSON_SCHEMA},
         "response_format.json_schema.schema", "guided_json"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "complete"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused_is_named(client, change, param, words):
    reply = client.post("/v1/chat/completions", json={**PATHS["/v1/chat/completions"], **change})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and words in error["message"]


def test_what_leaves_no_token_is_an_error_in_words(client):
    body = {**PATHS["/v1/completions"], "guided_regex": "a+", "allowed_token_ids": [0]}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 500
    assert "allowed_token_ids" in reply.json()["error"]["message"]


def test_values_that_ask_for_nothing(client):
    for change in (
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"grammar": "", "json_schema": None, "guided_json": None, "regex": None},
        {"structured_outputs": None},
    ):
        for path, body in PATHS.items():
            assert client.post(path, json={**body, "max_tokens": 2, **change}).status_code == 200


def test_the_offline_door(tiny_model):
    with LLM(tiny_model, **ENGINE) as llm:
        wanted = [
            StructuredOutputsParams(json=SCHEMA),
            StructuredOutputsParams(choice=["yes", "no1"]),
            None,
        ]
        params = [
            SamplingParams(max_tokens=48, temperature=1.5, seed=5, structured_outputs=each)
            for each in wanted
        ]
        record, choice, free = (o.outputs[0] for o in llm.generate(["a", "b", "c"], params))
        assert is_record(record.text) and is_yes_or_no(choice.text)
        assert llm.generate("c", params[2])[0].outputs[0].text == free.text
        with pytest.raises(InvalidRequest, match=r"structured_outputs.json: #/properties/a/not"):
            bad = StructuredOutputsParams(json=BAD)
            llm.generate("a", SamplingParams(structured_outputs=bad))
