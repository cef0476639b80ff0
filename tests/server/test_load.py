"""Heavy and hostile requests, and what they may cost their neighbours."""

import threading
from contextlib import contextmanager

import httpx2
import pytest
from server.fakes_server import (
    CODEC,
    CONFIG,
    MODEL,
    SpeakingExecutor,
    make_app,
    running,
    wait_until,
)
from server.test_lifecycle import LONG, send

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
        wait_until(lambda: app.state.relay._num_reserved == 12)
        for prompt in ("hello", "y" * 5000):
            reply = httpx2.post(f"{url}/v1/completions", json={**SHORT, "prompt": prompt})
            assert reply.status_code == 200
        assert app.state.relay._num_reserved == 12  # none of them has been done
        for connection in held[1:]:
            connection.close()  # and who leaves gives the place back at once
        wait_until(lambda: app.state.relay._num_reserved == 1)
        codec.gate.set()
        wait_until(lambda: app.state.relay._num_reserved == 0)
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
        wait_until(lambda: app.state.relay._num_reserved == 1)
        reply = httpx2.post(f"{url}/tokenize", json=large)
        assert reply.status_code == 503 and int(reply.headers["Retry-After"]) >= 1
        assert httpx2.post(f"{url}/tokenize", json={"prompt": "x" * 10_000}).status_code == 200
        codec.gate.set()
        held.close()
        wait_until(lambda: app.state.relay._num_reserved == 0)
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
