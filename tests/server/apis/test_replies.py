"""The shapes of replies, whole and streamed, over the real Engine and an executor that recites."""

import json
import threading
from itertools import chain

import pytest
from server.fakes_server import CODEC, MODEL, SpeakingExecutor, chunks, make_app, post
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
    said = {name: value for name, value in choice["message"].items() if value}
    assert said == {"role": "assistant", "content": TEXT}
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
        {
            **COMPLETION,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    )
    counts = [c["usage"]["completion_tokens"] for c in got]
    assert counts == sorted(counts) and counts[-1] == NUM_TOKENS


def test_usage_in_every_chunk_is_part_of_usage(client):
    options = {"stream_options": {"continuous_usage_stats": True}}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        got = chunks(client, path, {**body, **options})
        assert all("usage" not in c for c in got) and got[-1]["choices"]


def test_a_step_with_a_token_sends_a_chunk_also_without_text():
    """Held back for a stop string, half a character, or no text at all."""
    executor = SpeakingExecutor("ab" + "é" * 3 + "ab", step_s=0.05)
    held = {"max_tokens": 6, "stop": ["abéééabc"]}
    with TestClient(make_app(executor)[0]) as client:
        for path, base in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
            got = [c["choices"][0] for c in chunks(client, path, {**base, **held})]
            texts = [c["delta"]["content"] if "delta" in c else c["text"] for c in got]
            assert texts == [""] * (len(got) - 1) + ["abéé"]
            assert len(got) >= 3  # 6 where this machine is not too busy to keep up
    hidden = {**CHAT, "max_tokens": 5, "ignore_eos": True, "logit_bias": {"256": 100}}
    with TestClient(make_app(executor)[0]) as client:
        got = chunks(client, "/v1/chat/completions", {**hidden, "return_token_ids": True})
        assert sum(len(c["choices"][0]["token_ids"] or ()) for c in got) == 5
        assert all(c["choices"][0]["delta"]["content"] == "" for c in got) and len(got) >= 3


def test_chunks_with_logprobs_have_content(client):
    got = chunks(client, "/v1/chat/completions", {**CHAT, "logprobs": True})
    assert all("content" in c["choices"][0]["delta"] for c in got)
    assert all(c["choices"][0]["logprobs"] for c in got[1:])


def test_what_clients_of_vllm_read_is_null_and_not_absent(client):
    chat, completion = ("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)
    keys = {"prompt_logprobs", "prompt_token_ids", "kv_transfer_params", "service_tier"}
    whole = post(client, *chat)
    assert [whole[key] for key in sorted(keys)] == [None] * 4
    (choice,) = whole["choices"]
    assert choice["token_ids"] is choice["stop_reason"] is choice["logprobs"] is None
    message = choice["message"]
    for key in ("refusal", "annotations", "audio", "function_call", "reasoning",
                "reasoning_content"):  # fmt: skip
        assert message[key] is None
    assert message["tool_calls"] == []
    whole = post(client, *completion)
    assert whole["kv_transfer_params"] is whole["service_tier"] is None
    (choice,) = whole["choices"]
    for key in ("token_ids", "stop_reason", "logprobs", "prompt_logprobs", "prompt_token_ids"):
        assert choice[key] is None
    for path, body in (chat, completion):
        got = chunks(client, path, body)
        for key in ("token_ids", "stop_reason", "logprobs", "finish_reason"):
            assert all(key in c["choices"][0] for c in got)
        first = got[0] if path == chat[0] else got[0]["choices"][0]
        assert first["prompt_token_ids"] is None


def test_a_reply_can_be_sent_back_as_it_came(client):
    message = post(client, "/v1/chat/completions", CHAT)["choices"][0]["message"]
    again = [*CHAT["messages"], message, {"role": "user", "content": "and?"}]
    got = post(client, "/v1/chat/completions", {**CHAT, "messages": again})
    said = f"user: hi\nassistant: {TEXT}\nuser: and?\nassistant: "
    assert got["usage"]["prompt_tokens"] == len(said.encode())


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


def test_echo_puts_the_prompt_before_the_answer(client):
    body = {**COMPLETION, "max_tokens": 2, "echo": True, "logprobs": 0}
    choice = post(client, "/v1/completions", body)["choices"][0]
    assert choice["text"] == "abcHe"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "H", "e"]
    ids = post(client, "/v1/completions", {**COMPLETION, "prompt": [104, 105], "echo": True})
    assert ids["choices"][0]["text"] == "hi" + TEXT


def test_token_ids_are_returned_if_asked_for(client):
    body = {**COMPLETION, "return_token_ids": True}
    choice = post(client, "/v1/completions", body)["choices"][0]
    assert choice["prompt_token_ids"] == [97, 98, 99]
    assert choice["token_ids"] == [*TEXT.encode(), 256]
    got = [c["choices"][0] for c in chunks(client, "/v1/completions", body)]
    assert got[0]["prompt_token_ids"] == [97, 98, 99]
    assert [i for c in got for i in c["token_ids"] or ()] == choice["token_ids"]
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


def letters(*bodies, **settings):
    """The letters, each of a seed, that a fresh server answers; None where it refuses."""
    with TestClient(make_app(SpeakingExecutor(), **settings)[0]) as client:
        replies = [client.post("/v1/completions", json=body) for body in bodies]
    return [
        "".join(c["text"] for c in reply.json()["choices"]) if reply.is_success else None
        for reply in replies
    ]


def test_a_servers_seed_repeats_its_answers():
    one = {**COMPLETION, "max_tokens": 1}
    bodies = [one, one, {**one, "prompt": ["a", "b"]}, {**one, "n": 2}, {**one, "seed": 5}, one]
    got = letters(*bodies, seed=3)
    assert got == letters(*bodies, seed=3)
    assert got[:3] == ["d", "e", "fg"] and got[3][0] == "h" and got[4:] == ["f", "j"]
    assert got != letters(*bodies, seed=4)
    assert letters(one, one, one, one) != letters(one, one, one, one)


def test_a_refused_request_changes_no_later_answer():
    one = {**COMPLETION, "max_tokens": 1}
    too_long = {**one, "prompt": "x" * 600}
    half_good = {**one, "prompt": ["a", "x" * 600]}
    got = letters(one, too_long, half_good, {**one, "n": 0}, one, seed=0)
    assert got == ["a", None, None, None, "b"]


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
        *("queued", "blocks", "prompt", "decode", "shared", "stalled", "preempted", "reader"),
    }
    assert sum(got["parts_ms"].values()) == pytest.approx(got["total_ms"], abs=0.01)
    assert 0 < got["ttft_ms"] <= got["total_ms"]


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
    got = post(client, "/tokenize", bare)
    assert bytes(got["tokens"]) == b"user: x\n" and got["token_strs"] is None


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


def test_the_card_and_the_fingerprint_tell_how_the_model_is_computed():
    seen = set()
    exact = {
        "dtype": "float32",
        "quantization": "none",
        "kv_cache_dtype": "float32",
        "backend": "reference",
    }
    changes = exact | {
        "dtype": "bfloat16",
        "quantization": "int8",
        "kv_cache_dtype": "float16",
        "backend": "cpu/avx2",
    }
    for how in (exact, *(exact | {name: value} for name, value in changes.items())):
        with TestClient(make_app(SpeakingExecutor(), **how)[0]) as client:
            (card,) = client.get("/v1/models").json()["data"]
            assert how.items() <= card.items()
            seen.add(post(client, "/v1/completions", COMPLETION)["system_fingerprint"])
    assert len(seen) == 5


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
