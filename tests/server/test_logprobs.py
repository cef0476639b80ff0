"""How log-probabilities and text offsets are shown, whole and streamed."""

from dataclasses import replace

import pytest
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, chunks, make_app, post
from starlette.testclient import TestClient

from duetto.core.batch import SampledToken, TokenLogprob

TEXT = "Hello, wörld!"
NUM_TOKENS = len(TEXT.encode()) + 1  # and the end of sequence
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "abc", "max_tokens": 100}


@pytest.fixture(scope="module")
def client():
    with TestClient(make_app(SpeakingExecutor(TEXT))[0]) as made:
        yield made


def test_log_probabilities_of_a_completion(client):
    body = {**COMPLETION, "max_tokens": 2, "logprobs": 2}
    got = post(client, "/v1/completions", body)["choices"][0]["logprobs"]
    assert got == {
        "tokens": ["H", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}],
        "text_offset": [0, 1],
    }


def test_log_probabilities_of_a_chat(client):
    body = {**CHAT, "max_tokens": 10, "logprobs": True, "top_logprobs": 1}
    content = post(client, "/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}],
    }
    assert [entry["bytes"] for entry in content[8:10]] == [[0xC3], [0xB6]]  # halves of "ö"
    bare = post(client, "/v1/chat/completions", {**CHAT, "logprobs": True})
    assert bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_tokens_of_a_completion_as_their_ids(client):
    """Where the tokens begin is not changed by what they are called."""
    body = {**COMPLETION, "max_tokens": 2, "logprobs": 2, "return_tokens_as_token_ids": True}
    got = post(client, "/v1/completions", body)["choices"][0]["logprobs"]
    assert got["tokens"] == ["token_id:72", "token_id:101"]
    assert got["top_logprobs"][0] == {"token_id:72": -0.5, "token_id:73": -1.5}
    assert got["text_offset"] == [0, 1]
    echoed = post(client, "/v1/completions", {**body, "echo": True})["choices"][0]["logprobs"]
    assert echoed["tokens"] == [f"token_id:{token_id}" for token_id in b"abcHe"]
    assert echoed["top_logprobs"][1] == {"token_id:98": -0.5, "token_id:99": -1.5}
    assert echoed["text_offset"] == [0, 1, 2, 3, 4]
    (first, *_) = chunks(client, "/v1/completions", body)
    assert first["choices"][0]["logprobs"]["tokens"] == ["token_id:72"]


def test_tokens_of_a_chat_as_their_ids(client):
    """Which tells tokens apart that show the same; their bytes stay what they are."""
    body = {**CHAT, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    content = post(client, "/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content[8:10]] == ["token_id:195", "token_id:182"]
    assert content[0]["top_logprobs"] == [{"token": "token_id:72", "logprob": -0.5, "bytes": [72]}]
    (_, first, *_) = chunks(client, "/v1/chat/completions", body)
    assert first["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:72"


def test_streamed_log_probabilities_lose_no_token(client):
    body = {**CHAT, "logprobs": True}
    got = chunks(client, "/v1/chat/completions", body)
    entries = [e for c in got if c["choices"][0]["logprobs"] for e in
               c["choices"][0]["logprobs"]["content"]]  # fmt: skip
    assert len(entries) == NUM_TOKENS


def test_echo_with_no_tokens_scores_the_prompt(client):
    """As lm-eval asks for it."""
    body = {**COMPLETION, "max_tokens": 0, "echo": True, "logprobs": 1}
    got = post(client, "/v1/completions", body)
    (choice,) = got["choices"]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert got["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_in_vllms_shape(client):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        got = post(client, path, {**body, "prompt_logprobs": 1})
        where = got["choices"][0] if path == "/v1/completions" else got
        scored = where["prompt_logprobs"]
        assert scored[0] is None and len(scored) == got["usage"]["prompt_tokens"]
        (entry,) = scored[1].values()
        assert entry["logprob"] == -0.5 and entry["rank"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_point_into_the_text_also_within_a_character(client, stream):
    body = {**COMPLETION, "logprobs": 1}
    if stream:
        parts = [c["choices"][0]["logprobs"] for c in chunks(client, "/v1/completions", body)]
    else:
        parts = [post(client, "/v1/completions", body)["choices"][0]["logprobs"]]
    names = [name for part in parts if part for name in part["tokens"]]
    offsets = [at for part in parts if part for at in part["text_offset"]]
    at = TEXT.index("ö")
    assert names[at : at + 3] == ["bytes:\\xc3", "bytes:\\xb6", TEXT[at + 1]]
    assert offsets == [*range(at + 1), at, *range(at + 1, len(TEXT) + 1)]
    for name, start in zip(names, offsets, strict=True):
        assert name.startswith(("bytes:", "<end>")) or TEXT[start] == name


def test_text_offsets_of_an_echo_leave_out_what_it_does_not_show(client):
    body = {**COMPLETION, "logprobs": 0, "echo": True, "max_tokens": 2}
    for prompt, offsets in (("aé", [0, 1, 1, 2, 3]), ([97, 256, 98], [0, 1, 6, 7, 8])):
        (choice,) = post(client, "/v1/completions", {**body, "prompt": prompt})["choices"]
        assert choice["logprobs"]["text_offset"] == offsets
        assert choice["text"][offsets[-2]] == "H"


def test_tokens_that_are_half_a_character_do_not_share_an_entry(client):
    class Half(SpeakingExecutor):
        def _sample(self, item):
            return SampledToken(0xC3, TokenLogprob(0xC3, -0.5, 1, ((0xC3, -0.5), (0xE2, -1.5))))

    with TestClient(make_app(Half())[0]) as other:
        body = {**COMPLETION, "logprobs": 2, "max_tokens": 1}
        (top,) = post(other, "/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"]
    assert top == {"bytes:\\xc3": -0.5, "bytes:\\xe2": -1.5}


def streamed(client, body):
    """All chunks of each choice as one, and how many there were with log-probabilities."""
    joined, num_shown = {}, 0
    for chunk in chunks(client, "/v1/completions", body):
        (part,) = chunk["choices"]
        whole = joined.setdefault(part["index"], {"text": "", "logprobs": {}})
        whole["text"] += part["text"]
        whole["finish_reason"] = part["finish_reason"]
        for name, values in (part["logprobs"] or {}).items():
            whole["logprobs"].setdefault(name, []).extend(values)
        num_shown += part["logprobs"] is not None
        if part["prompt_token_ids"]:
            whole["prompt_token_ids"] = part["prompt_token_ids"]
    return joined, num_shown


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 0},
        {"prompt": "é"},
        {"prompt": "a"},
        {"prompt": [97, 256, 98]},
        {"prompt": ["ab", "x" * 200]},
        {"return_tokens_as_token_ids": True, "return_token_ids": True},
        {"logprobs": 0, "prompt": "a b" * 70},
    ],
    ids=str,
)
def test_an_echo_with_log_probabilities_is_the_same_streamed(client, more):
    body = {**COMPLETION, "max_tokens": 3, "logprobs": 2, "echo": True, **more}
    whole = post(client, "/v1/completions", body)["choices"]
    parts, num_shown = streamed(client, body)
    for choice in whole:
        part = parts[choice["index"]]
        assert part["text"] == choice["text"]
        assert part["logprobs"] == choice["logprobs"]
        assert part["finish_reason"] == choice["finish_reason"]
        assert part.get("prompt_token_ids") == choice["prompt_token_ids"]
    if len(body["prompt"]) > 128:
        assert num_shown >= 4  # as its parts are computed, and a few tokens at a time


def test_the_scores_of_a_streamed_echo_are_counted_and_bounded():
    """They may wait for the client, all of them."""
    body = {**COMPLETION, "prompt": "x" * 100, "echo": True, "logprobs": 20, "max_tokens": 2}
    app, _ = make_app(SpeakingExecutor(TEXT), max_reply_bytes=100 * 21 * 112)
    with TestClient(app) as narrow:
        assert streamed(narrow, body)[0][0]["text"] == "x" * 100 + "He"
        assert app.state.replies.num_bytes == 0
        longer = {**body, "prompt": "x" * 101, "stream": True}
        error = narrow.post("/v1/completions", json=longer).json()["error"]
    assert error["param"] == "logprobs" and "at most 235200 are accepted" in error["message"]
    assert "or stream" not in error["message"]


def test_without_log_probabilities_an_echo_comes_first(client):
    first, *_ = chunks(client, "/v1/completions", {**COMPLETION, "echo": True})
    assert first["choices"][0]["text"] == "abc" and first["choices"][0]["logprobs"] is None


ALL = [
    ("/v1/completions", "logprobs", {**COMPLETION, "logprobs": -1}),
    ("/v1/completions", "prompt_logprobs", {**COMPLETION, "prompt_logprobs": -1}),
    ("/v1/chat/completions", "top_logprobs", {**CHAT, "logprobs": True, "top_logprobs": -1}),
    ("/v1/responses", "top_logprobs", {"model": MODEL, "input": "hi", "top_logprobs": -1}),
]


@pytest.mark.parametrize(("path", "field", "body"), ALL)
def test_more_than_the_limit_is_refused_with_it(client, path, field, body):
    error = client.post(path, json=body).json()["error"]
    assert error["param"] == field
    words = "-1 is all 257 of the vocabulary; at most 20 are accepted here (--max-logprobs)"
    assert error["message"] == f"{field}: {words}"


def test_the_whole_vocabulary_is_shown_where_the_limit_allows_it():
    config = replace(CONFIG, max_logprobs=300)
    with TestClient(make_app(SpeakingExecutor(TEXT), config)[0]) as wide:
        for path, _, body in ALL:
            assert num_beside(post(wide, path, body)) == 128  # of these many the fake tells
        body = {**COMPLETION, "prompt": "a" * 99, "max_tokens": 2, "echo": True, "logprobs": -1}
        whole = post(wide, "/v1/completions", body)["choices"][0]
        parts, num_shown = streamed(wide, body)
        assert parts[0]["logprobs"] == whole["logprobs"] and parts[0]["text"] == whole["text"]
        assert num_shown > 99 // 5  # rows of so many candidates come a few at a time
        error = wide.post("/v1/completions", json={**COMPLETION, "logprobs": 301}).json()["error"]
    assert error["message"].startswith("logprobs: 301; at most 300 are accepted here")


def num_beside(reply):
    """How many tokens stand beside one that is scored."""
    if "output" in reply:
        (part,) = reply["output"][0]["content"]
        return len({one["token"] for one in part["logprobs"][0]["top_logprobs"]})
    choice = reply["choices"][0]
    if "message" in choice:
        return len({one["token"] for one in choice["logprobs"]["content"][0]["top_logprobs"]})
    scored = choice["prompt_logprobs"] or choice["logprobs"]["top_logprobs"]
    return len(scored[1])
