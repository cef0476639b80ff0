"""truncate_prompt_tokens keeps the end of a prompt; where that cannot be, it is refused by name."""

import pytest
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, make_app, post
from starlette.testclient import TestClient

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LONG = "x" * 600 + "the end"  # longer than the context


@pytest.fixture(scope="module")
def client():
    with TestClient(make_app(SpeakingExecutor("ok"))[0]) as made:
        yield made


def completion(client, **asked):
    return post(client, COMPLETIONS, {"model": MODEL, "return_token_ids": True, **asked})


@pytest.mark.parametrize("prompt", ["a longer text", list(b"a longer text")])
@pytest.mark.parametrize(
    ("kept", "text"), [(4, "text"), (13, "a longer text"), (99, "a longer text")]
)
def test_the_last_tokens_are_kept(client, prompt, kept, text):
    told = completion(client, prompt=prompt, truncate_prompt_tokens=kept)
    assert bytes(told["choices"][0]["prompt_token_ids"]).decode() == text
    assert told["usage"]["prompt_tokens"] == len(text)


def test_each_prompt_is_cut(client):
    told = completion(client, prompt=["abc", "d", "efg"], truncate_prompt_tokens=2)
    ids = [choice["prompt_token_ids"] for choice in told["choices"]]
    assert [bytes(each).decode() for each in ids] == ["bc", "d", "fg"]


def test_a_chat_is_cut_as_its_template_wrote_it(client):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    whole = post(client, f"{CHAT}/render", body)["token_ids"]
    body |= {"truncate_prompt_tokens": 3, "return_token_ids": True}
    assert post(client, CHAT, body)["prompt_token_ids"] == whole[-3:]
    rendered = post(client, f"{CHAT}/render", body)
    assert rendered["token_ids"] == whole[-3:]
    assert rendered["prompt"] == bytes(whole[-3:]).decode()


@pytest.mark.parametrize("prompt", [LONG, list(LONG.encode())])
@pytest.mark.parametrize("max_tokens", [1, 40])
def test_what_is_longer_than_the_context_is_cut_to_what_fits(client, prompt, max_tokens):
    assert client.post(COMPLETIONS, json={"model": MODEL, "prompt": prompt}).status_code == 400
    asked = {"prompt": prompt, "max_tokens": max_tokens, "truncate_prompt_tokens": -1}
    ids = completion(client, **asked)["choices"][0]["prompt_token_ids"]
    assert len(ids) == CONFIG.context_length - max_tokens
    assert bytes(ids).decode().endswith("the end")


def test_a_prompt_that_is_still_too_long_is_refused(client):
    asked = {"model": MODEL, "prompt": LONG, "max_tokens": 500, "truncate_prompt_tokens": 50}
    error = client.post(COMPLETIONS, json=asked).json()["error"]
    assert error["code"] == "context_length_exceeded" and "50 in the prompt" in error["message"]


def test_an_echo_is_what_was_kept(client):
    asked = {"prompt": "a longer text", "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = completion(client, **asked, truncate_prompt_tokens=4)["choices"][0]
    assert choice["text"] == "texto"
    assert choice["logprobs"]["tokens"] == [*"text", "o"]


@pytest.mark.parametrize("reuse", [None, False])
def test_marked_texts_are_not_cut(client, reuse):
    segments = {"segments": [{"text": "abc", "reusable": True}, "d"]}
    asked = {"model": MODEL, "prompt": segments, "reuse": reuse, "truncate_prompt_tokens": 2}
    reply = client.post(COMPLETIONS, json=asked)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "truncate_prompt_tokens"


def test_segments_without_marks_are_cut(client):
    told = completion(client, prompt={"segments": ["abc", "d"]}, truncate_prompt_tokens=2)
    assert told["choices"][0]["prompt_token_ids"] == [*b"cd"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/v1/cache/lookup", {"prompt": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "a"}),
    ],
)
@pytest.mark.parametrize(
    ("name", "value"), [("truncate_prompt_tokens", -1), ("return_tokens_as_token_ids", True)]
)
def test_other_routes_refuse_it_by_name(client, path, body, name, value):
    reply = client.post(path, json={"model": MODEL, **body, name: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(f"{name}: ")
