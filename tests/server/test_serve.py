"""The socket, the wire's limits, and processes that are told to end."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from server import fakes_server
from server.fakes_server import MODEL, SpeakingExecutor, make_app, running, wait_until

from duetto.core.errors import ConfigError
from duetto.server.serve import bind, check_exposure, listen
from duetto.server.settings import ServerSettings
from duetto.server.wire import BoundedHttp

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


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("no.such.host.invalid", 0)])
def test_an_address_that_cannot_be_had_is_one_line(host, port):
    with pytest.raises(ConfigError, match="--host"):
        bind(host, port)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_queued_reqs": -1},
        {"sse_keep_alive_s": 0},
        {"stall_timeout_s": float("nan")},
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
from duetto.server.serve import listen, serve
from duetto.server.settings import ServerSettings
app, _ = make_app(SpeakingExecutor(step_s=0.02))
serve(app, ServerSettings(served_model_name=MODEL), listen("127.0.0.1", {port}))
"""


def start():
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    tests = str(Path(fakes_server.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(tests=tests, port=port)],
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


def test_a_second_signal_does_not_wait():
    process, url = start()
    body = {"model": MODEL, "prompt": "a", "max_tokens": 500, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body) as reply:
        lines = reply.iter_lines()  # kept, or the stream would be closed
        next(lines)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert time.monotonic() - began < 3
    process.stderr.close()
