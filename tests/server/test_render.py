"""/v1/…/render says what a request would give the engine, and gives the engine nothing."""

import pytest
from server.fakes_server import MODEL, SpeakingExecutor, make_app, post
from starlette.testclient import TestClient

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "hé"}], "max_tokens": 3}


@pytest.fixture
def client_and_executor():
    executor = SpeakingExecutor("hello")
    with TestClient(make_app(executor, seed=7)[0]) as client:
        yield client, executor


@pytest.fixture
def client(client_and_executor):
    return client_and_executor[0]


def test_a_chat_is_what_the_engine_is_given_for_it(client):
    shown = post(client, f"{CHAT}/render", ASKED)
    real = post(client, CHAT, {**ASKED, "return_token_ids": True})
    assert shown["token_ids"] == real["prompt_token_ids"]
    assert bytes(shown["token_ids"]).decode() == shown["prompt"]
    assert "hé" in shown["prompt"]
    assert shown["model"] == MODEL and shown["max_tokens"] == 3
    assert shown["request_id"].startswith("chatcmpl-")


def test_completions_show_each_prompt(client):
    body = {"model": MODEL, "prompt": ["ab", "c"], "n": 2}
    first, second = post(client, f"{COMPLETIONS}/render", body)
    assert (first["token_ids"], first["prompt"]) == ([97, 98], "ab")
    assert (second["token_ids"], second["prompt"]) == ([99], "c")
    assert first["max_tokens"] == 16


def test_ids_and_segments_are_shown_as_what_they_say(client):
    body = {"model": MODEL, "prompt": [104, 105, 256]}
    (shown,) = post(client, f"{COMPLETIONS}/render", body)
    assert (shown["token_ids"], shown["prompt"]) == ([104, 105, 256], "hi<end>")
    segments = {"segments": ["a", {"text": "b", "reusable": True}]}
    (shown,) = post(client, f"{COMPLETIONS}/render", {"model": MODEL, "prompt": segments})
    assert (shown["token_ids"], shown["prompt"]) == ([97, 98], "ab")


def test_nothing_runs_and_no_seed_is_used_up(client_and_executor):
    client, executor = client_and_executor
    executor.text = None  # says a letter of its seed
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    first = post(client, COMPLETIONS, body)["choices"][0]["text"]
    num_steps = executor.num_steps
    for _ in range(3):
        post(client, f"{COMPLETIONS}/render", body)
    assert executor.num_steps == num_steps
    assert not client.app.state.relay.num_live
    second = post(client, COMPLETIONS, body)["choices"][0]["text"]
    assert ord(second[0]) == ord(first[0]) + 1  # the next seed


def test_a_label_is_not_taken_by_it(client):
    headers = {"X-Request-Id": "mine"}
    for _ in range(2):
        reply = client.post(f"{CHAT}/render", json=ASKED, headers=headers)
        assert reply.json()["request_id"] == "chatcmpl-mine"
    assert client.post(CHAT, json=ASKED, headers=headers).json()["id"] == "chatcmpl-mine"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "other"}, "model"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"wrong": 1}, "wrong"),
    ],
)
def test_what_the_real_route_refuses_is_refused(client, change, param):
    body = {**ASKED, **change}
    real, rendered = client.post(CHAT, json=body), client.post(f"{CHAT}/render", json=body)
    assert rendered.status_code in (400, 404)
    assert rendered.json() == real.json()
    assert rendered.json()["error"]["param"] == param
