"""`duetto planner --apply` with a router and worker processes, for real: it starts them, answers
come, and those that are too many are drained."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx2 as httpx
import pytest

from duetto.demo import demo_model_dir

pytestmark = pytest.mark.oracle  # half a minute
MODEL = str(demo_model_dir())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_workers_are_started_and_drained_while_answers_come() -> None:
    join, url = f"tcp://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    duetto = (sys.executable, "-m", "duetto")
    port = url.partition(":")[2]
    router = subprocess.Popen(
        [*duetto, "router", MODEL, "--listen", join, "--port", port, "--join-timeout", "120"]
    )
    words = (
        f"planner {url} --model {MODEL} --hardware h100 --slo-ttft 60s --slo-tpot 10s "
        "--interval 4s --num-windows 4 --agree-fewer 1 --dwell-fewer 0s --min-requests 2 --json "
        "--replicas 2 --no-disaggregate --apply --workers local --worker"
    ).split()
    worker = f"{MODEL} --join {join} --join-timeout 60 --threads 1"
    planner = subprocess.Popen([*duetto, *words, worker], stdout=subprocess.PIPE, text=True)
    answers: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        body = {"model": "duetto-demo", "prompt": "The capital", "max_tokens": 8}
        with httpx.Client(base_url=f"http://{url}", timeout=60.0) as client:
            while not is_over.is_set():
                with suppress(httpx.HTTPError):  # nobody listens yet
                    answers.append(client.post("/v1/completions", json=body).status_code)
                time.sleep(0.2)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        out, _ = planner.communicate(timeout=200)
    finally:
        is_over.set()
        asking.join()
        for process in (planner, router):
            process.send_signal(signal.SIGTERM)
        for process in (planner, router):
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    decisions = [json.loads(line) for line in out.splitlines()]
    assert planner.returncode == 0
    assert [d["action"] for d in decisions].count("change") == 1
    assert decisions[-1]["current"] == {"replicas": 1, "prefill_replicas": 0}
    assert answers.count(200) > 5
