"""The shapes of replies, whole and streamed, over the real Engine and an executor that recites."""

import json
import threading
from itertools import chain

import pytest
from server.fakes_server import CODEC, MODEL, SpeakingExecutor, make_app
from starlette.testclient import TestClient

TEXT = "Hello, wörld!"
NUM_TOKENS = len(TEXT.encode()) + 1  # and the end of sequence
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "abc", "max_tokens": 100}


@pytest.fixture(scope="module")
def client():
    app, _ = make_app(SpeakingExecutor(TEXT), model_root="/home/someone/model")
    with TestClient(app) as made:
        yield made


@pytest.fixture(scope="module")
def seeded():
    """A server whose every answer is a letter that depends on the request's seed alone."""
    app, _ = make_app(SpeakingExecutor())
    with TestClient(app) as made:
        yield made


def post(client, path, body):
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def chunks(client, path, body):
    """The decoded events of a stream; checks the framing on the way."""
    reply = client.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_a_completion(client):
    body = post(client, "/v1/completions", COMPLETION)
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["model"] == MODEL and body["system_fingerprint"].startswith("fp_")
    (choice,) = body["choices"]
    assert choice["text"] == TEXT and choice["index"] == 0 and choice["logprobs"] is None
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": NUM_TOKENS,
        "total_tokens": 3 + NUM_TOKENS,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_chat(client):
    body = post(client, "/v1/chat/completions", CHAT)
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] == len("user: hi\nassistant: ")


def test_a_chat_streamed(client):
    got = chunks(client, "/v1/chat/completions", CHAT)
    assert {c["object"] for c in got} == {"chat.completion.chunk"}
    assert len({c["id"] for c in got}) == 1
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in got) == TEXT
    assert [c["choices"][0]["finish_reason"] for c in got] == [None] * (len(got) - 1) + ["stop"]
    assert "�" not in json.dumps(got, ensure_ascii=False)
    assert all("usage" not in c for c in got)
    assert "timings" in got[-1]


def test_usage_comes_in_a_chunk_of_its_own_if_asked_for(client):
    options = {"stream_options": {"include_usage": True}}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        got = chunks(client, path, {**body, **options})
        assert [c["usage"] for c in got[:-1]] == [None] * (len(got) - 1)
        assert got[-1]["choices"] == []
        assert got[-1]["usage"]["completion_tokens"] == NUM_TOKENS


def test_usage_in_every_chunk_if_asked_for(client):
    got = chunks(
        client,
        "/v1/completions",
        {**COMPLETION, "stream_options": {"continuous_usage_stats": True}},
    )
    counts = [c["usage"]["completion_tokens"] for c in got]
    assert counts == sorted(counts) and counts[-1] == NUM_TOKENS


def test_a_completion_streamed_equals_the_whole(client):
    for more in ({}, {"echo": True}, {"stop": ["wö"]}, {"max_tokens": 5}, {"logprobs": 1}):
        whole = post(client, "/v1/completions", {**COMPLETION, **more})["choices"][0]
        parts = [c["choices"][0] for c in chunks(client, "/v1/completions", {**COMPLETION, **more})]
        assert "".join(part["text"] for part in parts) == whole["text"]
        assert parts[-1]["finish_reason"] == whole["finish_reason"]
        assert parts[-1]["stop_reason"] == whole["stop_reason"]
        if whole["logprobs"] is not None:
            for name, values in whole["logprobs"].items():
                lists = [p["logprobs"][name] for p in parts if p["logprobs"] is not None]
                assert list(chain(*lists)) == values


def test_a_stop_string_is_named_and_not_shown(client):
    choice = post(client, "/v1/completions", {**COMPLETION, "stop": [", w", "zz"]})["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "stop")
    assert choice["stop_reason"] == ", w"


def test_length_is_the_reason_when_max_tokens_are_used_up(client):
    for path, body, name in (
        ("/v1/completions", COMPLETION, "max_tokens"),
        ("/v1/chat/completions", CHAT, "max_tokens"),
        ("/v1/chat/completions", CHAT, "max_completion_tokens"),
    ):
        got = post(client, path, {**body, name: 4})
        assert got["choices"][0]["finish_reason"] == "length"
        assert got["usage"]["completion_tokens"] == 4


def test_a_completion_has_16_tokens_by_default_and_a_chat_all_it_can(seeded):
    short = post(seeded, "/v1/completions", {"model": MODEL, "prompt": "a"})
    assert short["usage"]["completion_tokens"] == 16
    long = post(seeded, "/v1/chat/completions", CHAT)
    assert long["usage"]["total_tokens"] == 512


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


def test_echo_puts_the_prompt_before_the_answer(client):
    body = {**COMPLETION, "max_tokens": 2, "echo": True, "logprobs": 0}
    choice = post(client, "/v1/completions", body)["choices"][0]
    assert choice["text"] == "abcHe"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "H", "e"]
    ids = post(client, "/v1/completions", {**COMPLETION, "prompt": [104, 105], "echo": True})
    assert ids["choices"][0]["text"] == "hi" + TEXT


def test_prompt_logprobs_in_vllms_shape(client):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        got = post(client, path, {**body, "prompt_logprobs": 1})
        where = got["choices"][0] if path == "/v1/completions" else got
        scored = where["prompt_logprobs"]
        assert scored[0] is None and len(scored) == got["usage"]["prompt_tokens"]
        (entry,) = scored[1].values()
        assert entry["logprob"] == -0.5 and entry["rank"] == 1


def test_token_ids_are_returned_if_asked_for(client):
    body = {**COMPLETION, "return_token_ids": True}
    choice = post(client, "/v1/completions", body)["choices"][0]
    assert choice["prompt_token_ids"] == [97, 98, 99]
    assert choice["token_ids"] == [*TEXT.encode(), 256]
    got = [c["choices"][0] for c in chunks(client, "/v1/completions", body)]
    assert got[0]["prompt_token_ids"] == [97, 98, 99]
    assert [i for c in got for i in c.get("token_ids", ())] == choice["token_ids"]
    chat = post(client, "/v1/chat/completions", {**CHAT, "return_token_ids": True})
    assert bytes(chat["prompt_token_ids"]) == b"user: hi\nassistant: "


def test_the_four_shapes_of_a_prompt(client):
    for prompt, count in (("ab", 1), (["ab", "cd"], 2), ([97, 98], 1), ([[97], [98], [99]], 3)):
        body = post(client, "/v1/completions", {**COMPLETION, "prompt": prompt})
        assert [c["index"] for c in body["choices"]] == list(range(count))
        assert body["usage"]["completion_tokens"] == count * NUM_TOKENS


def test_n_answers_to_each_prompt_in_order(seeded):
    body = {**COMPLETION, "prompt": ["ab", "cd"], "n": 2, "seed": 7, "max_tokens": 2}
    got = post(seeded, "/v1/completions", body)
    texts = [c["text"] for c in got["choices"]]
    assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3]
    assert texts[:2] == texts[2:] and texts[0] != texts[1]  # a seed of its own for each of the n
    assert got["usage"]["prompt_tokens"] == 4  # each prompt counts once
    assert all("timings" in c for c in got["choices"]) and "timings" not in got
    streamed: dict[int, str] = {}
    for chunk in chunks(seeded, "/v1/completions", body):
        for choice in chunk["choices"]:
            streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert [streamed[i] for i in range(4)] == texts


def test_a_seed_repeats_an_answer_and_none_does_not(seeded):
    body = {**COMPLETION, "max_tokens": 1}
    same = {post(seeded, "/v1/completions", {**body, "seed": 5})["choices"][0]["text"]
            for _ in range(3)}  # fmt: skip
    assert same == {"f"}
    drawn = {post(seeded, "/v1/completions", body)["choices"][0]["text"] for _ in range(12)}
    assert len(drawn) > 1


def test_cached_tokens_are_told(client):
    body = {**COMPLETION, "prompt": "a prompt of more than one block", "max_tokens": 1}
    assert cached(post(client, "/v1/completions", body)) == 0
    again = post(client, "/v1/completions", body)
    assert cached(again) == 28 and again["timings"]["cache_n"] == 28
    assert cached(post(client, "/v1/completions", {**body, "cache_salt": "mine"})) == 0
    assert cached(post(client, "/v1/completions", {**body, "cache_salt": "mine"})) == 28


def test_answers_that_share_a_prompt_do_not_count_each_others_tokens_as_cached(client):
    body = {**COMPLETION, "prompt": "another prompt of many blocks", "max_tokens": 1, "n": 3}
    got = post(client, "/v1/completions", body)
    assert cached(got) == 0
    assert [c["timings"]["cache_n"] for c in got["choices"]] == [0, 28, 28]  # each its own


def cached(body):
    return body["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_timings_tile_the_latency(client):
    got = post(client, "/v1/completions", COMPLETION)["timings"]
    assert got["prompt_n"] + got["cache_n"] == 3 and got["predicted_n"] == NUM_TOKENS
    assert set(got["parts_ms"]) == {
        *("queued", "prompt", "decode", "shared", "stalled", "preempted"),
    }
    assert sum(got["parts_ms"].values()) == pytest.approx(got["total_ms"], abs=0.01)
    assert 0 < got["ttft_ms"] <= got["total_ms"]


def test_text_parts_of_a_message_are_joined(client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    got = post(
        client, "/tokenize", {"messages": [{"role": "user", "content": parts}], "model": MODEL}
    )
    assert bytes(got["tokens"]).decode() == "user: one\ntwo\nassistant: "


def test_tokenize_and_detokenize(client):
    got = post(client, "/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert got == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [104, 0xC3, 0xA9],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    assert post(client, "/detokenize", {"tokens": got["tokens"]}) == {"prompt": "hé"}
    bare = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    assert bytes(post(client, "/tokenize", bare)["tokens"]) == b"user: x\n"


def test_only_a_long_text_is_tokenized_off_the_loop():
    where = []

    class Watched(type(CODEC)):
        def encode(self, text, *, add_special_tokens=True):
            where.append(threading.current_thread())
            return super().encode(text)

    app, _ = make_app(SpeakingExecutor(), codec=Watched())
    with TestClient(app) as client:
        for length in (1, 50_000, 1):
            assert post(client, "/tokenize", {"prompt": "x" * length})["count"] == length
    assert where[0] is where[2] is not where[1]


def test_models_version_and_health(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == [MODEL]
    assert listed["data"][0]["max_model_len"] == 512 and "someone" not in str(listed)
    assert client.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    assert client.get("/v1/models/other/one").json()["error"]["code"] == "model_not_found"
    assert client.get("/version").json() == {"version": "1.2.3"}
    for reply in (client.get("/health"), client.get("/ping"), client.post("/ping")):
        assert (reply.status_code, reply.content) == (200, b"")


def test_defaults_of_the_model_stand_behind_the_callers_and_before_openais():
    app, _ = make_app(SpeakingExecutor(), default_sampling={"max_tokens": 3})
    with TestClient(app) as client:
        body = {"model": MODEL, "prompt": "a"}
        assert post(client, "/v1/completions", body)["usage"]["completion_tokens"] == 3
        body["max_tokens"] = 5
        assert post(client, "/v1/completions", body)["usage"]["completion_tokens"] == 5
        assert post(client, "/v1/chat/completions", CHAT)["usage"]["completion_tokens"] == 3


def test_a_default_is_cut_to_the_room_and_a_callers_number_is_not():
    app, _ = make_app(SpeakingExecutor(), default_sampling={"max_tokens": 10_000})
    with TestClient(app) as client:
        got = post(client, "/v1/chat/completions", CHAT)
        assert got["usage"]["total_tokens"] == 512
        assert client.post("/v1/completions", json={**COMPLETION, "max_tokens": 10_000}).is_error
