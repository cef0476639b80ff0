"""A chat may go on with its last message."""

import pytest
from server.fakes_server import MODEL, SpeakingExecutor, make_app
from starlette.testclient import TestClient

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hel"}]


@pytest.fixture(scope="module")
def client():
    with TestClient(make_app(SpeakingExecutor("lo"))[0]) as client:
        yield client


@pytest.mark.parametrize("begins", [{}, {"add_generation_prompt": False}])
def test_the_prompt_ends_within_the_last_message(client, begins):
    asked = {"messages": MESSAGES, "continue_final_message": True, **begins}
    tokens = client.post("/tokenize", json=asked).json()["tokens"]
    assert bytes(tokens).decode() == "user: hi\nassistant: hel"
    reply = client.post("/v1/chat/completions", json={"model": MODEL, **asked}).json()
    assert reply["choices"][0]["message"]["content"] == "lo"
    assert reply["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("field", [None, False])
def test_else_an_answer_begins(client, field):
    asked = {"messages": MESSAGES, "continue_final_message": field}
    tokens = client.post("/tokenize", json=asked).json()["tokens"]
    assert bytes(tokens).decode() == "user: hi\nassistant: hel\nassistant: "
