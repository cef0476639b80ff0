"""A router and workers that Ray placed: answers come, also after a worker was killed. For real, so
with duetto[ray] only."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest

from duetto.cluster.child_workers import worker_command
from duetto.cluster.ray_service import workers as serve_workers
from duetto.cluster.ray_workers import RayWorkers, import_ray
from duetto.demo import demo_model_dir

pytestmark = [
    pytest.mark.oracle,  # half a minute
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs duetto[ray]"),
    pytest.mark.filterwarnings("ignore"),
]
MODEL = str(demo_model_dir())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(is_so: Callable[[], bool], timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


@pytest.fixture
def ray() -> Iterator[Any]:
    ray = import_ray()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def router() -> Iterator[tuple[str, str]]:
    """Where workers join, and where clients ask."""
    join, port = f"tcp://127.0.0.1:{free_port()}", free_port()
    words = ("router", MODEL, "--listen", join, "--port", str(port), "--join-timeout", "120")
    process = subprocess.Popen([sys.executable, "-m", "duetto", *words])
    try:
        yield join, f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answer(url: str) -> str | None:
    """To one question; None if nobody answers."""
    body = {"model": "duetto-demo", "prompt": "The capital", "max_tokens": 8, "temperature": 0}
    with suppress(httpx.HTTPError), httpx.Client(timeout=30.0) as client:
        reply = client.post(f"{url}/v1/completions", json=body)
        if reply.status_code == 200:
            return str(reply.json()["choices"][0]["text"])
    return None


def test_workers_under_ray_answer_and_are_restarted(ray: Any, router: tuple[str, str]) -> None:
    join, url = router
    command = worker_command([MODEL, "--join", join, "--join-timeout", "60", "--threads", "1"])
    workers = RayWorkers(command)
    workers.scale(1, 0)
    until(lambda: answer(url) is not None)
    first = answer(url)
    (actor,) = workers._actors["both"]
    pid = ray.get(actor.ping.remote())
    os.kill(pid, signal.SIGKILL)
    until(lambda: workers.live() == (1, 0) and ray.get(actor.ping.remote()) != pid)
    until(lambda: answer(url) == first)
    workers.stop()
    assert workers.live() == (0, 0)


def test_ray_serve_keeps_workers(ray: Any, router: tuple[str, str]) -> None:
    serve = pytest.importorskip("ray.serve")
    join, url = router
    words = [MODEL, "--join", join, "--join-timeout", "60", "--threads", "1"]
    application = serve_workers({"worker": words, "role": "both"})
    serve.run(application, route_prefix=None)
    try:
        until(lambda: answer(url) is not None)
    finally:
        serve.shutdown()
