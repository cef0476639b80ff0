"""The names of the model that is served: one, several, or any."""

import json

import pytest
from server.fakes_server import MODEL, SpeakingExecutor, make_app, post
from starlette.testclient import TestClient

from duetto.core.errors import ConfigError
from duetto.server.settings import ServerSettings

MESSAGES = [{"role": "user", "content": "hi"}]
SAMPLING = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/completions/render": {"prompt": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"input": "hi"},
}
OTHER_ROUTES = {
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/cache/lookup": {"prompt": "a"},
}
BODIES = SAMPLING | OTHER_ROUTES


def client_of(**settings):
    return TestClient(make_app(SpeakingExecutor("ok"), **settings)[0])


@pytest.mark.parametrize("path", BODIES)
def test_every_api_knows_all_names_and_no_other(path):
    with client_of(other_model_names=("gpt-4o", "a/b")) as client:
        for name in (MODEL, "gpt-4o", "a/b"):
            post(client, path, {**BODIES[path], "model": name})
        reply = client.post(path, json={**BODIES[path], "model": "gpt-5"})
    assert reply.status_code == 404
    message = reply.json()["error"]["message"]
    assert "'gpt-5'" in message and f"'{MODEL}', 'gpt-4o', 'a/b'" in message


@pytest.mark.parametrize("path", BODIES)
def test_any_name_may_be_accepted(path):
    with client_of(accepts_any_model=True) as client:
        post(client, path, {**BODIES[path], "model": "claude-sonnet"})


@pytest.mark.parametrize("path", SAMPLING)
@pytest.mark.parametrize("settings", [{"other_model_names": ("x",)}, {"accepts_any_model": True}])
def test_replies_show_the_first(path, settings):
    with client_of(**settings) as client:
        shown = post(client, path, {**SAMPLING[path], "model": "x"})
        reply = shown[0] if isinstance(shown, list) else shown
        assert reply["model"] == MODEL
        if path.endswith("/render"):
            return
        text = client.post(path, json={**SAMPLING[path], "model": "x", "stream": True}).text
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    told = [json.loads(line) for line in data]
    first = told[0].get("message") or told[0].get("response") or told[0]
    assert first["model"] == MODEL


def test_all_are_listed_and_found():
    with client_of(other_model_names=("a/b",)) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == [MODEL, "a/b"]
        assert {card["root"] for card in cards} == {MODEL}
        assert client.get("/v1/models/a/b").json() == cards[1]
        assert client.get("/v1/models/c").status_code == 404


def test_any_name_is_found_as_the_served_one():
    with client_of(accepts_any_model=True) as client:
        assert client.get("/v1/models/c").json()["id"] == MODEL
        assert len(client.get("/v1/models").json()["data"]) == 1


@pytest.mark.parametrize("names", [("",), ("a", " "), ("a", "a"), ("a", "b", "a")])
def test_names_that_cannot_be(names):
    with pytest.raises(ConfigError, match="--served-model-name"):
        ServerSettings(served_model_name=names[0], other_model_names=names[1:])
