"""Clients that leave, read slowly or come in numbers; engines that fail, stall or stop."""

import json
import socket
import threading
import time

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

from duetto.core.config import SchedulerConfig
from duetto.server.http import serve
from duetto.server.http.wire import BoundedHttp

LONG = {"model": MODEL, "prompt": "a prompt of more than one block", "max_tokens": 400}
BODIES = [
    ("/v1/completions", {**LONG, "stream": True}),
    ("/v1/completions", LONG),
    ("/v1/completions", {**LONG, "n": 3, "prompt": ["ab", "cd"]}),
]


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def send(url, path, body, **headers):
    """A request on a socket of its own, whose reply is not read."""
    data = json.dumps(body).encode()
    extra = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{extra}\r\n"
    connection = connect(url)
    connection.sendall(head.encode() + data)
    return connection


def events(reply):
    return [line for line in reply.iter_lines() if line]


def timings_of(connection):
    """The timings in the reply that a connection has been waiting for."""
    data = b""
    while not data.endswith(b"}"):
        data += connection.recv(65536)
    return json.loads(data.split(b"\r\n\r\n")[1])["timings"]


@pytest.fixture
def executor():
    return SpeakingExecutor()


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_closing_the_connection_frees_the_blocks_within_two_steps(executor, path, body):
    app, engine = make_app(executor)
    executor.step_s = 0.02
    with running(app) as url:
        connection = send(url, path, body)
        wait_until(lambda: executor.num_steps > 2 and not engine.scheduler.waiting)
        before = executor.num_steps
        connection.close()
        wait_until(lambda: has_all_blocks(engine))
        assert executor.num_steps - before <= 2
        wait_until(lambda: app.state.relay.num_live == 0)


def test_a_client_that_leaves_while_it_waits_in_the_queue_costs_nothing(executor):
    app, engine = make_app(executor)
    executor.gate.clear()
    with running(app) as url:
        connections = [send(url, "/v1/completions", LONG) for _ in range(12)]
        wait_until(lambda: app.state.relay.num_live == 12)
        for connection in connections:
            connection.close()
        wait_until(lambda: all(x.answer.is_gone for x in app.state.relay._live.values()))
        executor.gate.set()
        wait_until(lambda: has_all_blocks(engine))
        assert executor.num_steps <= 1


def test_a_request_arrives_when_its_body_has_been_read(executor):
    body = json.dumps({**LONG, "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with running(make_app(executor)[0]) as url, connect(url) as connection:
        connection.sendall(head.encode())
        time.sleep(0.5)
        connection.sendall(body)
        assert timings_of(connection)["total_ms"] < 400


@pytest.mark.parametrize("length", [100, 5000], ids=["on the loop", "on a thread"])
def test_a_request_arrives_when_it_has_been_tokenized(executor, length):
    class Slow(type(CODEC)):
        max_token_bytes = 100

        def encode(self, text, *, add_special_tokens=True):
            time.sleep(0.5)
            return [1] * 100

    body = {**LONG, "prompt": "x" * length, "max_tokens": 1}
    app, _ = make_app(executor, codec=Slow())
    with running(app) as url, send(url, "/v1/completions", body) as connection:
        assert timings_of(connection)["total_ms"] < 400


def test_a_silent_stream_is_kept_alive_by_comments(executor):
    app, _ = make_app(executor, sse_keep_alive_s=0.05)
    executor.gate.clear()
    body = {**LONG, "max_tokens": 2, "stream": True}
    lines = []
    with running(app) as url, httpx2.stream("POST", f"{url}/v1/completions", json=body) as reply:
        for line in reply.iter_lines():  # the headers have come, though no token has
            lines += [line] if line else []
            if lines.count(": keep-alive") == 3:
                executor.gate.set()
    assert lines[:3] == [": keep-alive"] * 3 and lines[-1] == "data: [DONE]"
    text = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line[6:7] == "{"]
    assert len("".join(text)) == 2


def test_a_failure_before_the_first_token_is_a_status(executor):
    app, engine = make_app(executor)
    executor.fails = True
    with running(app) as url:
        for body in (LONG, {**LONG, "stream": True}):
            reply = httpx2.post(f"{url}/v1/completions", json=body)
            assert reply.status_code == 500 and "secret" not in reply.text
            assert reply.json()["error"]["code"] == "engine_error"
        assert has_all_blocks(engine)


def test_a_failure_in_mid_stream_is_an_event_and_then_done(executor):
    app, engine = make_app(executor)
    executor.step_s = 0.005
    with (
        running(app) as url,
        httpx2.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as reply,
    ):
        assert reply.status_code == 200
        lines = []
        for line in reply.iter_lines():
            executor.fails = executor.num_steps > 3
            if line:
                lines.append(line)
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["error"]["type"] == "server_error"
        assert "secret" not in "".join(lines)
        wait_until(lambda: has_all_blocks(engine))


def test_a_full_queue_is_503_before_anything_is_tokenized(executor):
    app, _ = make_app(executor, max_num_queued_reqs=2)
    executor.gate.clear()
    with running(app) as url:
        held = [send(url, "/v1/completions", LONG) for _ in range(CONFIG.max_num_seqs + 2)]
        wait_until(lambda: app.state.relay.num_live == CONFIG.max_num_seqs + 2)
        reply = httpx2.post(f"{url}/v1/completions", json={**LONG, "prompt": [10**6]})
        assert reply.status_code == 503  # 400 would tell that the prompt was looked at
        assert reply.json()["error"]["code"] == "server_overloaded"
        assert int(reply.headers["Retry-After"]) >= 1
        assert httpx2.get(f"{url}/health").status_code == 200
        for connection in held:
            connection.close()
        executor.gate.set()
        wait_until(lambda: app.state.relay.num_live == 0)
        assert httpx2.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 1}).is_success


def test_more_answers_than_may_ever_be_held_are_refused_with_the_numbers(executor):
    app, _ = make_app(executor, max_num_queued_reqs=4)  # beside the 8 that run
    with running(app) as url:

        def ask(**more):
            return httpx2.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 1, **more})

        assert len(ask(prompt=["a"] * 12).json()["choices"]) == 12
        assert len(ask(prompt=["a"] * 6, n=2).json()["choices"]) == 12
        for field, more in (("prompt", {"prompt": ["a"] * 13}), ("n", {"n": 13})):
            reply = ask(**more)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, field)
            assert "13 answers" in error["message"]
            assert "at most 12: 8 that run and 4 that wait" in error["message"]


def test_health_tells_a_dead_engine(executor):
    app, engine = make_app(executor)

    def step():
        raise MemoryError("bug")

    engine.step = step
    with running(app) as url:
        reply = httpx2.post(f"{url}/v1/completions", json=LONG)
        assert reply.status_code == 500 and "bug" not in reply.text
        wait_until(lambda: httpx2.get(f"{url}/health").status_code == 503)
        reply = httpx2.post(f"{url}/v1/completions", json=LONG)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")


def test_shutdown_lets_requests_end(executor):
    executor.step_s = 0.005
    app, _ = make_app(executor)
    body = {**LONG, "max_tokens": 40}
    replies = []
    with running(app) as url:
        asking = threading.Thread(
            target=lambda: replies.append(httpx2.post(f"{url}/v1/completions", json=body))
        )
        asking.start()
        wait_until(lambda: executor.num_steps > 2)
    asking.join(5)
    assert replies[0].status_code == 200
    assert replies[0].json()["usage"]["completion_tokens"] == 40


def test_shutdown_ends_a_stream_that_outlasts_it_with_an_error_event(executor):
    executor.step_s = 0.02
    app, engine = make_app(executor, shutdown_timeout_s=0.2)
    lines = []

    def read(url):
        with httpx2.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as reply:
            lines.extend(events(reply))

    with running(app, shutdown_timeout_s=0.2) as url:
        asking = threading.Thread(target=read, args=(url,))
        asking.start()
        wait_until(lambda: executor.num_steps > 2)
    asking.join(5)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["error"]["code"] == "server_stopping"
    assert has_all_blocks(engine)


def test_while_stopping_nothing_new_is_accepted(executor):
    app, _ = make_app(executor)
    with running(app) as url:
        app.state.relay.is_stopping = True
        for reply in (
            httpx2.get(f"{url}/health"),
            httpx2.post(f"{url}/v1/completions", json=LONG),
        ):
            assert reply.status_code == 503 and reply.headers["Retry-After"]
            assert reply.json()["error"]["code"] == "server_stopping"


def test_a_client_that_reads_nothing_is_cut_and_the_others_are_served(monkeypatch):
    """Its reply is larger than all buffers; the engine never waits for it."""
    cut = []

    class Watched(BoundedHttp):
        write_timeout_s = 1.0

        def connection_lost(self, exc):
            cut.append(self.client)
            super().connection_lost(exc)

    monkeypatch.setattr(serve, "BoundedHttp", Watched)
    roomy = SchedulerConfig(
        num_blocks=4096, max_model_len=16_000, max_num_seqs=64, max_num_batched_tokens=16_000
    )
    app, engine = make_app(SpeakingExecutor(), roomy, max_pending_bytes=20_000)
    body = {**LONG, "max_tokens": 8000, "logprobs": 20, "stream": True, "n": 8}
    with running(app) as url, send(url, "/v1/completions", body) as connection:
        wait_until(lambda: engine.has_work)
        assert httpx2.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 2}).is_success
        wait_until(lambda: not engine.has_work)  # far from done, but too much is unread
        assert connection.getsockname() not in cut
        wait_until(lambda: connection.getsockname() in cut)
        assert engine.scheduler.pool.num_free == 4096


def test_a_client_that_waits_gets_an_answer_of_any_size(executor):
    app, _ = make_app(executor, max_pending_bytes=1000)
    body = {**LONG, "max_tokens": 20, "n": 3, "logprobs": 20, "prompt_logprobs": 20}
    with running(app) as url:
        reply = httpx2.post(f"{url}/v1/completions", json=body)
    assert reply.status_code == 200 and len(reply.content) > 50_000
    assert [len(choice["prompt_logprobs"]) for choice in reply.json()["choices"]] == [31] * 3


def test_many_clients_that_come_and_go_leave_nothing_behind(executor):
    executor.step_s = 0.001
    app, engine = make_app(executor)

    def client(number):
        for index in range(10):
            path, body = BODIES[(number + index) % len(BODIES)]
            with send(url, path, {**body, "max_tokens": 20}) as connection:
                if (number + index) % 2:
                    time.sleep(0.005)
                else:
                    connection.recv(1000)

    with running(app) as url:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: app.state.relay.num_live == 0)
        wait_until(lambda: has_all_blocks(engine))
        engine.scheduler.check()
