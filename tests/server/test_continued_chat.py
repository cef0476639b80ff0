"""A chat may go on with its last message."""

import json

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


def streamed_text(client, body):
    reply = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in reply.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (MESSAGES, "hello"),
        (
            [MESSAGES[0], {"role": "assistant", "content": [{"type": "text", "text": "hel"}]}],
            "hello",
        ),
        (MESSAGES[:1], "lo"),  # the user's is not of the answer
    ],
)
def test_echo_begins_the_answer_with_the_assistants_last_message(client, messages, text):
    continues = messages[-1]["role"] == "assistant"
    body = {"model": MODEL, "messages": messages, "continue_final_message": continues}
    body = {**body, "echo": True}
    reply = client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == text
    assert streamed_text(client, body) == text
