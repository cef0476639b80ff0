"""The socket, the wire's limits, and processes that are told to end."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from cyclopts import CycloptsError
from server import fakes_server
from server.fakes_server import MODEL, SpeakingExecutor, make_app, running, wait_until

from duetto.cli.app import app
from duetto.cli.door_options import DoorOptions
from duetto.cli.serve import serve as serve_command
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.server.http.serve import bind, check_exposure, listen, make_server
from duetto.server.http.wire import BoundedHttp
from duetto.server.settings import ServerSettings

OPEN = ServerSettings(served_model_name=MODEL)
KEYED = ServerSettings(served_model_name=MODEL, api_keys=("k",))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_local_address_needs_no_key(host):
    check_exposure(host, (), insecure_no_auth=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_a_public_address_needs_a_key_or_an_explicit_word(host):
    with pytest.raises(ConfigError, match="--api-key"):
        check_exposure(host, (), insecure_no_auth=False)
    check_exposure(host, ("secret",), insecure_no_auth=False)
    check_exposure(host, (), insecure_no_auth=True)


def test_a_port_in_use_is_one_line():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listen("127.0.0.1", port)
    assert f"--port {port}" in str(caught.value) and "\n" not in str(caught.value)


def test_an_address_that_cannot_be_had_is_one_line():
    with pytest.raises(ConfigError, match="--host"):
        bind("no.such.host.invalid", 0)


@pytest.mark.parametrize("port", [-1, 65_536, 99_999_999])
def test_what_is_no_port_is_refused_with_the_range(port):
    with pytest.raises(ConfigError, match=f"--port {port}: must be from 0 .* to 65535"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_queued_reqs": -1},
        {"sse_keep_alive_s": 0},
        {"sse_keep_alive_s": float("inf")},
        {"stall_timeout_s": float("nan")},
        {"shutdown_timeout_s": float("nan")},
        {"shutdown_timeout_s": float("inf")},
        {"shutdown_timeout_s": 1e300},
        {"shutdown_timeout_s": -1},
        {"seed": 2**64},
        {"max_body_bytes": 0},
        {"api_keys": ("",)},
        {"api_keys": (" k",)},
        {"default_sampling": {"temperature": -1}},
        {"default_sampling": {"unknown": 1}},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        ServerSettings(served_model_name=MODEL, **wrong)


def test_the_longest_and_the_shortest_shutdown_work():
    for seconds in (0, 86_400):
        settings = replace(OPEN, shutdown_timeout_s=seconds)
        server = make_server(make_app(SpeakingExecutor())[0], settings)
        assert server.config.timeout_graceful_shutdown > seconds


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("--shutdown-timeout", {"options": DoorOptions(shutdown_timeout=float("nan"))}),
        ("--sse-keep-alive-interval", {"options": DoorOptions(sse_keep_alive_interval=-1.0)}),
        ("--max-num-queued-reqs", {"options": DoorOptions(max_num_queued_reqs=-1)}),
        ("--api-key", {"options": DoorOptions(api_key=("",))}),
        (
            "--allowed-origins",
            {"options": DoorOptions(allowed_origins=("null", "https://a.example/"))},
        ),
        ("--seed", {"args": EngineArgs(seed=2**64)}),
        ("--host", {"options": DoorOptions(host="0.0.0.0")}),
        ("--max-local-prefill: needs --prefill-replicas", {"max_local_prefill": 3}),
        ("--max-local-prefill -1", {"max_local_prefill": -1, "prefill_replicas": 1}),
    ],
)
def test_the_command_refuses_its_flags_before_it_looks_for_a_model(flag, arguments):
    with pytest.raises(ConfigError, match=flag):
        serve_command("no/such/model/anywhere", **arguments)


def test_the_command_knows_its_log_levels():
    with pytest.raises(CycloptsError) as caught:
        words = ["serve", "no/such/model/anywhere", "--log-level", "loud"]
        app(words, exit_on_error=False, print_error=False)
    assert "--log-level" in str(caught.value) and "debug" in str(caught.value)


def test_the_fingerprint_is_stable_and_tells_models_apart():
    again = ServerSettings(served_model_name=MODEL)
    other = ServerSettings(served_model_name="other")
    assert OPEN.system_fingerprint == again.system_fingerprint != other.system_fingerprint


# --- the wire ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundedHttp, "head_timeout_s", 0.3)
        with running(make_app(SpeakingExecutor("ok"), body_timeout_s=0.3)[0]) as made:
            yield made


def exchange(url, *pieces, pause_s=0.0):
    """Send raw bytes; the reply until the server closes, or b"" if it cuts the connection."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            while data := connection.recv(65536):
                received += data
        except ConnectionError:
            pass
    return received


def head(*lines):
    return "\r\n".join(["GET /health HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def test_a_usual_head_is_served(url):
    assert b" 200 " in exchange(url, head("X: y", "Connection: close"))


@pytest.mark.parametrize(
    "data",
    [
        head(*[f"X-{i}: y" for i in range(101)]),
        head("X: " + "y" * 1_000_000),
        head("y" * 300_000 + ": x"),
        b"GET /" + b"y" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
        head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("Content-Length: 5", "Content-Length: 6") + b"aaaaaa",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01 this is TLS",
    ],
    ids=range(8),
)
def test_a_head_beyond_the_limits_or_ambiguous_is_refused(url, data):
    reply = exchange(url, data)
    assert reply == b"" or b" 400 " in reply.split(b"\r\n")[0]
    assert httpx2.get(f"{url}/health").status_code == 200


def test_a_slow_head_is_cut(url):
    start = time.monotonic()
    assert exchange(url, b"GET /health HT") == b""
    assert exchange(url) == b""  # not one byte
    assert time.monotonic() - start < 3


def test_a_head_that_drips_is_cut_all_the_same(url):
    reply = exchange(url, *[b"G", b"E", b"T", b" ", b"/", b"h", b"e"], pause_s=0.1)
    assert reply == b""


def test_a_slow_body_is_408(url):
    reply = exchange(url, b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    assert b" 408 " in reply and b"did not arrive" in reply


TRAILERS = (
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
)


def test_endless_trailers_are_cut(url):
    started = time.monotonic()
    assert exchange(url, TRAILERS + b"X: ", *[b"a" * 100_000] * 20, pause_s=0.01) == b""
    assert time.monotonic() - started < 2


def test_usual_trailers_are_read(url):
    asked = TRAILERS.replace(b"Host: x", b"Host: x\r\nConnection: close")
    assert b" 400 " in exchange(url, asked + b"X: y\r\n\r\n")


@pytest.mark.parametrize("path", [b"/nope", b"/health"])
def test_a_body_that_nobody_reads_may_not_drip_for_long(url, path):
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head)
        assert b" 40" in connection.recv(65536)
        with pytest.raises(ConnectionError):
            for _ in range(20):
                time.sleep(0.1)
                connection.sendall(b"a")


def test_a_refused_upload_still_reads_its_reply(url):
    body = b"a" * 300_000
    head = f"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert b" 404 " in exchange(url, head, body)


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_an_upgrade_is_ignored_and_its_body_read(url, pieces):
    """As Java's HttpClient and `curl --http2` ask for HTTP/2 with their first request."""
    body = b'{"prompt":"abc"}'
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    sent = head + body + b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    size = len(sent) // pieces + 1
    parts = [sent[at : at + size] for at in range(0, len(sent), size)]
    reply = exchange(url, *parts, pause_s=0.01)
    assert b'"tokens":[97,98,99]' in reply and b"1.2.3" in reply


STREAM = b'{"model":"fake","prompt":"a","max_tokens":3,"stream":true}'


def ask(version, path=b"/v1/completions", body=STREAM, *headers):
    lines = [b"POST %s HTTP/%s" % (path, version), b"Host: x", *headers]
    lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(body), b"", body]
    return b"\r\n".join(lines)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (b"Connection: keep-alive",),
        (b"Expect: 100-continue",),
        (b"Connection: Upgrade", b"Upgrade: h2c"),
    ],
    ids=str,
)
def test_a_stream_for_http_1_0_is_the_events_alone_and_ends_with_its_connection(url, headers):
    top, _, rest = exchange(url, ask(b"1.0", b"/v1/completions", STREAM, *headers)).partition(
        b"\r\n\r\n"
    )
    assert b" 200 " in top.split(b"\r\n")[0]
    assert b"transfer-encoding" not in top.lower() and b"connection: close" in top.lower()
    events = rest.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""] and len(events) > 3
    assert all(event.startswith(b"data: ") for event in events[:-1])


def test_a_whole_reply_for_http_1_0_has_a_length(url):
    for path, body, word in (
        (b"/v1/completions", STREAM.replace(b"true", b"false"), b" 200 "),
        (b"/v1/completions", STREAM.replace(b'"a"', b"7"), b" 400 "),
        (b"/nope", b"{}", b" 404 "),
    ):
        top, _, rest = exchange(url, ask(b"1.0", path, body)).partition(b"\r\n\r\n")
        assert word in top and b"content-length: %d\r\n" % len(rest) in top + b"\r\n"
        json.loads(rest)


def test_a_stream_for_http_1_1_stays_chunked(url):
    reply = exchange(url, ask(b"1.1", b"/v1/completions", STREAM, b"Connection: close"))
    assert b"transfer-encoding: chunked" in reply and reply.endswith(b"\r\n0\r\n\r\n")


def test_connect_is_refused(url):
    assert b" 400 " in exchange(url, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")


def test_a_bad_head_behind_a_running_stream_cuts_the_connection_and_no_more(caplog):
    executor = SpeakingExecutor(step_s=0.02)
    app, engine = make_app(executor)
    body = b'{"model":"fake","prompt":"a","max_tokens":400,"stream":true}'
    ask = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with running(app) as url:
        reply = exchange(url, ask + body, head(*[f"X-{i}: y" for i in range(101)]), pause_s=0.3)
        assert b" 200 " in reply and b" 400 " not in reply
        wait_until(lambda: not engine.has_work)
    assert "Traceback" not in caplog.text


def test_a_second_request_on_a_connection_has_a_head_time_of_its_own(url):
    time.sleep(0.4)
    with httpx2.Client() as client:
        for _ in range(3):
            assert client.get(f"{url}/health").status_code == 200
            time.sleep(0.15)


# --- processes ---------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from server.fakes_server import MODEL, SpeakingExecutor, make_app
from duetto.server.http.serve import listen, serve
from duetto.server.settings import ServerSettings
app, _ = make_app({executor})
serve(app, ServerSettings(served_model_name=MODEL), listen("127.0.0.1", {port}))
"""


def start(executor="SpeakingExecutor(step_s=0.02)"):
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    tests = str(Path(fakes_server.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(tests=tests, port=port, executor=executor)],
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"

    def is_ready():
        assert process.poll() is None, process.stderr.read()
        try:
            return httpx2.get(f"{url}/health").status_code == 200
        except httpx2.TransportError:
            return False

    wait_until(is_ready, 20)
    return process, url


def test_a_signal_lets_a_stream_end_and_exits_with_0():
    process, url = start()
    body = {"model": MODEL, "prompt": "a", "max_tokens": 20, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert process.wait(10) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("num_more", [1, 2, 50])
def test_more_signals_end_replies_at_once_and_cleanly(num_more):
    process, url = start()
    body = {"model": MODEL, "prompt": "a", "max_tokens": 500}
    whole = []
    asking = threading.Thread(
        target=lambda: whole.append(httpx2.post(f"{url}/v1/completions", json=body))
    )
    asking.start()
    with httpx2.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        # The other client has come too: after the signal nobody is let in.
        wait_until(lambda: httpx2.get(f"{url}/load").json()["server_load"] == 2, timeout=30)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        began = time.monotonic()
        for _ in range(num_more):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        rest = [line for line in lines if line]
    assert process.wait(10) == 0 and time.monotonic() - began < 5  # of 10 that the answer has left
    assert rest[-1] == "data: [DONE]" and "server_stopping" in rest[-2]
    asking.join()
    assert whole[0].status_code == 503
    assert whole[0].json()["error"]["code"] == "server_stopping"
    log = process.stderr.read()
    process.stderr.close()
    assert "Traceback" not in log and "ERROR" not in log


def test_a_client_that_reads_nothing_does_not_hold_up_the_second_signal():
    process, url = start("SpeakingExecutor('x' * 400)")
    body = {"model": MODEL, "prompt": "a", "max_tokens": 400, "logprobs": 20, "n": 8}
    data = json.dumps({**body, "stream": True}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
            + data
        )
        time.sleep(0.5)
        began = time.monotonic()
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.wait(10) == 0 and time.monotonic() - began < 3
    log = process.stderr.read()
    process.stderr.close()
    assert "Traceback" not in log
