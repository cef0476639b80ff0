"""Heavy and hostile requests, and what they may cost their neighbours."""

import socket
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import pytest
from server.fakes_server import (
    CODEC,
    CONFIG,
    MODEL,
    SpeakingExecutor,
    has_all_blocks,
    make_app,
    running,
    wait_until,
)
from server.test_lifecycle import LONG, send

from duetto.server.http import serve
from duetto.server.http.json_parts import JsonRows
from duetto.server.http.wire import BoundedHttp

SHORT = {"model": MODEL, "prompt": "hello", "max_tokens": 1}


class GatedCodec(type(CODEC)):
    """Large texts wait for a gate; says which threads it was asked on."""

    max_token_bytes = None

    def __init__(self):
        self.gate = threading.Event()
        self.threads = set()

    def encode(self, text, *, add_special_tokens=True):
        self.threads.add(threading.current_thread().name)
        if len(text) > 2**17:
            self.gate.wait(10)
            return [65] * len(text)
        return super().encode(text[:100], add_special_tokens=add_special_tokens)

    def render_chat(self, messages, **more):
        self.threads.add(threading.current_thread().name)
        return super().render_chat(messages, **more)

    def token_text(self, token_id):
        self.threads.add(threading.current_thread().name)
        return super().token_text(token_id)


@contextmanager
def serving(codec=CODEC, **settings):
    app, _ = make_app(SpeakingExecutor(), codec=codec, **settings)
    with running(app) as url:
        yield url, app


def test_small_requests_are_answered_while_large_texts_wait():
    codec = GatedCodec()
    with serving(codec) as (url, app):
        large = {"model": MODEL, "prompt": "x" * 2**18}
        held = [send(url, "/tokenize", large) for _ in range(6)]
        held += [send(url, "/v1/completions", large) for _ in range(6)]
        wait_until(lambda: app.state.relay._places.num_held == 12)
        for prompt in ("hello", "y" * 5000):
            reply = httpx2.post(f"{url}/v1/completions", json={**SHORT, "prompt": prompt})
            assert reply.status_code == 200
        assert app.state.relay._places.num_held == 12  # none of them has been done
        for connection in held[1:]:
            connection.close()  # and who leaves gives the place back at once
        wait_until(lambda: app.state.relay._places.num_held == 1)
        codec.gate.set()
        wait_until(lambda: app.state.relay._places.num_held == 0)
        held[0].close()


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"tokens": [65]}])
def test_tokenize_and_detokenize_are_admitted_like_any_request(body):
    path = "/tokenize" if "prompt" in body else "/detokenize"
    executor = SpeakingExecutor()
    app, _ = make_app(executor, max_num_queued_reqs=0)
    executor.gate.clear()
    with running(app) as url:
        assert httpx2.post(url + path, json=body).status_code == 200
        held = [send(url, "/v1/completions", LONG) for _ in range(CONFIG.max_num_seqs)]
        wait_until(lambda: app.state.relay.num_live == CONFIG.max_num_seqs)
        reply = httpx2.post(url + path, json=body)
        assert reply.status_code == 503 and int(reply.headers["Retry-After"]) >= 1
        assert reply.json()["error"]["code"] == "server_overloaded"
        for connection in held:
            connection.close()
        executor.gate.set()
        wait_until(lambda: app.state.relay.num_live == 0)
        app.state.relay.is_stopping = True
        assert httpx2.post(url + path, json=body).json()["error"]["code"] == "server_stopping"


def test_more_bytes_than_may_be_held_are_503():
    codec = GatedCodec()
    with serving(codec, max_held_bytes=2**19) as (url, app):
        large = {"model": MODEL, "prompt": "x" * 2**18}
        held = send(url, "/tokenize", large)
        wait_until(lambda: app.state.relay._places.num_held == 1)
        reply = httpx2.post(f"{url}/tokenize", json=large)
        assert reply.status_code == 503 and int(reply.headers["Retry-After"]) >= 1
        assert httpx2.post(f"{url}/tokenize", json={"prompt": "x" * 10_000}).status_code == 200
        codec.gate.set()
        held.close()
        wait_until(lambda: app.state.relay._places.num_held == 0)
        assert httpx2.post(f"{url}/tokenize", json=large).status_code == 200


def test_chats_and_large_texts_never_run_on_the_event_loop():
    codec = GatedCodec()
    codec.gate.set()
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with serving(codec) as (url, _):
        loop_thread = next(
            t.name for t in threading.enumerate() if t.name.endswith("(run)") and t.is_alive()
        )
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/tokenize", {"messages": chat["messages"]}),
            ("/tokenize", {"prompt": "x" * 2**18, "return_token_strs": True}),
            ("/v1/completions", {**SHORT, "prompt": "x" * 5000}),
        ):
            assert httpx2.post(url + path, json=body).status_code == 200
        assert codec.threads and loop_thread not in codec.threads


# --- large replies ---------------------------------------------------------------------------


class Scoring(SpeakingExecutor):
    """Counts the prompt's tokens that it was asked to score."""

    num_scored = 0

    def submit(self, batch):
        self.num_scored += sum(len(r.prompt_logprob_targets) for r in batch.requests)
        return super().submit(batch)


CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 0,
    "seed": 1,
}
PROMPT = {"model": MODEL, "prompt": "p" * 150, "temperature": 0, "seed": 1}
HEAVY = [
    ("/v1/completions", {**PROMPT, "max_tokens": 100, "n": 4, "logprobs": 3}),
    ("/v1/completions", {**PROMPT, "max_tokens": 100, "n": 3, "prompt_logprobs": 3}),
    ("/v1/completions", {**PROMPT, "max_tokens": 70, "n": 3, "logprobs": 2, "echo": True}),
    ("/v1/completions", {**PROMPT, "max_tokens": 0, "n": 2, "logprobs": 0, "echo": True}),
    ("/v1/completions", {**PROMPT, "prompt": ["p" * 65, "q" * 99], "n": 2, "prompt_logprobs": 1}),
    ("/v1/completions", {**PROMPT, "max_tokens": 64, "return_token_ids": True}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 200, "n": 2, "logprobs": True}),
    (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 65, "logprobs": True, "top_logprobs": 4, "prompt_logprobs": 2},
    ),
]
VOLATILE = ("id", "created", "timings")


def without_times(reply):
    reply = {key: value for key, value in reply.items() if key not in VOLATILE}
    return reply | {
        "choices": [{k: v for k, v in c.items() if k != "timings"} for c in reply["choices"]],
        "usage": {k: v for k, v in reply["usage"].items() if k != "prompt_tokens_details"},
    }


@pytest.mark.parametrize(("path", "body"), HEAVY)
def test_a_reply_in_parts_off_the_loop_is_the_same_reply(path, body, monkeypatch):
    replies = []
    for most in (2**30, 100):
        monkeypatch.setattr("duetto.server.exchange.LARGE_BYTES", most)
        monkeypatch.setattr("duetto.server.http.text_work.LARGE_BYTES", most)
        for rows in (10**6, 7):
            monkeypatch.setattr("duetto.server.apis.shapes.NUM_AT_ONCE", rows)
            monkeypatch.setattr("duetto.server.http.json_parts.NUM_AT_ONCE", rows)
            with serving() as (url, app):
                reply = httpx2.post(url + path, json=body)
                assert reply.status_code == 200, reply.text
                assert int(reply.headers["content-length"]) == len(reply.content)
                replies.append(without_times(reply.json()))
                assert app.state.replies.num_bytes == 0
    assert all(reply == replies[0] for reply in replies)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {**PROMPT, "prompt_logprobs": 2}),
        ("/v1/completions", {**PROMPT, "logprobs": 2, "echo": True}),
        ("/v1/chat/completions", {**CHAT, "prompt_logprobs": 2}),
    ],
)
def test_a_prompt_with_n_answers_is_scored_once_and_shown_with_each(path, more):
    executor = Scoring()
    app, engine = make_app(executor)
    with running(app) as url:
        one = httpx2.post(url + path, json={**more, "max_tokens": 2}).json()
        num_scored = executor.num_scored
        many = httpx2.post(url + path, json={**more, "max_tokens": 2, "n": 8}).json()
        assert executor.num_scored == 2 * num_scored
        assert has_all_blocks(engine)
    assert len(many["choices"]) == 8
    if "messages" in more:
        assert many["prompt_logprobs"] == one["prompt_logprobs"] != [None]
        return
    for choice in many["choices"]:
        assert choice["prompt_logprobs"] == one["choices"][0]["prompt_logprobs"]
        if "echo" in more:
            n = len(PROMPT["prompt"])
            first, shown = one["choices"][0]["logprobs"], choice["logprobs"]
            assert shown["token_logprobs"][:n] == first["token_logprobs"][:n]
            assert len(shown["tokens"]) == n + 2


LIMITED = {"max_reply_bytes": 100_000}


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/completions", "logprobs", {**PROMPT, "max_tokens": 200, "logprobs": 20}),
        ("/v1/completions", "logprobs", {**PROMPT, "max_tokens": 20, "n": 8, "logprobs": 5}),
        ("/v1/completions", "n", {**PROMPT, "max_tokens": 250, "n": 8}),
        ("/v1/completions", "prompt_logprobs", {**PROMPT, "max_tokens": 1, "prompt_logprobs": 20}),
        ("/v1/completions", "logprobs", {**PROMPT, "max_tokens": 0, "logprobs": 20, "echo": True}),
        (
            "/v1/completions",
            "prompt_logprobs",
            {**PROMPT, "prompt": ["p"] * 16, "n": 4, "max_tokens": 1, "prompt_logprobs": 20},
        ),
        (
            "/v1/chat/completions",
            "top_logprobs",
            {**CHAT, "max_tokens": 200, "logprobs": True, "top_logprobs": 20},
        ),
    ],
)
def test_the_product_of_what_is_asked_is_limited_and_named(path, field, body):
    with serving(**LIMITED) as (url, app):
        reply = httpx2.post(url + path, json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, field)
        assert "at most 100000" in error["message"] and f"n={body.get('n', 1)}" in error["message"]
        assert app.state.relay.num_live == 0
        if "prompt_logprobs" not in body and not body.get("echo"):
            streamed = httpx2.post(url + path, json={**body, "stream": True})
            assert streamed.status_code == 200  # it goes out as it comes


def test_an_answer_of_any_length_ends_where_its_reply_would_be_too_large():
    body = {**CHAT, "logprobs": True, "top_logprobs": 20}
    with serving(**LIMITED) as (url, _):
        choice = httpx2.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert 10 < len(choice["logprobs"]["content"]) < 30


def test_large_replies_together_are_bounded_and_small_ones_go_on(monkeypatch):
    monkeypatch.setattr("duetto.server.answering.LITTLE_REPLY_BYTES", 10_000)
    executor = SpeakingExecutor()
    app, _ = make_app(executor, max_replies_bytes=200_000)
    executor.gate.clear()
    large = {**PROMPT, "max_tokens": 200, "logprobs": 1}
    with running(app) as url:
        held = send(url, "/v1/completions", large)
        wait_until(lambda: app.state.relay.num_live == 1)
        refused = httpx2.post(f"{url}/v1/completions", json={**large, "n": 2})
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
        small = send(url, "/v1/completions", SHORT)
        wait_until(lambda: app.state.relay.num_live == 2)
        for connection in (held, small):
            connection.close()
        executor.gate.set()
        wait_until(lambda: app.state.replies.num_bytes == 0)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(200)}}),
        ("allowed_token_ids", {"allowed_token_ids": list(range(200))}),
        ("stop_token_ids", {"stop_token_ids": list(range(200)), "min_tokens": 1}),
    ],
)
def test_long_lists_count_for_each_answer_that_runs(field, more, monkeypatch):
    monkeypatch.setattr("duetto.server.apis.sampling.MAX_STEP_ENTRIES", 8 * 200 - 1)
    with serving() as (url, _):
        for n, status in ((1, 200), (7, 200), (8, 400), (100, 400)):
            reply = httpx2.post(f"{url}/v1/completions", json={**SHORT, "n": n, **more})
            assert reply.status_code == status
        error = reply.json()["error"]
        assert error["param"] == field
        assert "200 entries" in error["message"] and "8 answers" in error["message"]


def test_a_client_that_takes_nothing_of_a_whole_reply_is_cut_and_nothing_stays_held(monkeypatch):
    cut = []

    class Watched(BoundedHttp):
        write_timeout_s = 0.5

        def connection_lost(self, exc):
            cut.append(self.client)
            super().connection_lost(exc)

    monkeypatch.setattr(serve, "BoundedHttp", Watched)
    monkeypatch.setattr("duetto.server.exchange.LARGE_BYTES", 2**18)
    monkeypatch.setattr(JsonRows, "parts", lambda _: iter([b"[" + b" " * 2**25 + b"]"]))
    with serving() as (url, app):
        with send(url, "/v1/completions", {**PROMPT, "prompt_logprobs": 20}) as connection:
            wait_until(lambda: connection.getsockname() in cut)
        wait_until(lambda: app.state.replies.num_bytes == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux's sockets")
def test_the_kernel_holds_little_of_what_a_client_does_not_read():
    num_bytes = 0
    with (
        serve.bind("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        connection.setblocking(False)
        for _ in range(20):
            try:
                while num_bytes < 2**24:
                    num_bytes += connection.send(b"x" * 65536)
            except BlockingIOError:
                time.sleep(0.005)
    assert 0 < num_bytes < 2**20  # and 4 MB without the option
