"""A server whose engine hangs or has ended: clients are told, and the process ends."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
from server.fakes_server import MODEL, SpeakingExecutor, make_app, running, wait_until

from duetto.core.errors import ConfigError
from duetto.server.http.serve import FAILED_EXIT_CODE
from duetto.server.settings import ServerSettings

TESTS = Path(__file__).parent.parent
LONG = {"model": MODEL, "prompt": "a prompt of more than one block", "max_tokens": 400}
PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from server.fakes_server import MODEL, SpeakingExecutor, make_app
from duetto.server.http.serve import bind, serve
from duetto.server.settings import ServerSettings

how, failing_now = sys.argv[2], False

class Failing(SpeakingExecutor):
    def submit(self, batch):
        global failing_now
        failing_now = len(batch.requests) == 2  # both clients are there
        if failing_now and how == "hangs":
            self.gate.clear()
            while not self.gate.wait(1000):
                pass
        return super().submit(batch)

app, engine = make_app(Failing(step_s=0.01), step_timeout_s=0.5)
if how == "ends":
    step = engine.step
    def failing():
        if failing_now:
            raise MemoryError("secret")
        return step()
    engine.step = failing
listener = bind("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
serve(app, ServerSettings(served_model_name=MODEL), listener, log_level="critical")
"""


@pytest.mark.parametrize("how", ["hangs", "ends"])
def test_the_process_ends_and_its_clients_are_told_first(how):
    command = [sys.executable, "-c", PROCESS, str(TESTS), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            replies, lines = [], []

            def ask():
                replies.append(httpx2.post(f"{url}/v1/completions", json=LONG, timeout=30))

            def stream():
                body = {**LONG, "stream": True}
                with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as reply:
                    lines.extend(line for line in reply.iter_lines() if line)

            threads = [threading.Thread(target=each) for each in (ask, stream)]
            for each in threads:
                each.start()
            for each in threads:
                each.join(30)
            told_at = time.monotonic()
            assert process.wait(10) == FAILED_EXIT_CODE
            assert time.monotonic() - told_at < 5
        finally:
            process.kill()
    assert replies[0].status_code == 500 and "secret" not in replies[0].text
    assert replies[0].json()["error"]["code"] == "engine_error"
    if lines[-1] == "data: [DONE]":  # it had begun
        assert json.loads(lines[-2][6:])["error"]["type"] == "server_error"


def test_health_fails_and_nobody_waits_for_an_engine_that_hangs():
    executor = SpeakingExecutor()
    app, engine = make_app(executor, step_timeout_s=0.3)
    failures = []
    app.state.relay.on_failure = failures.append
    executor.gate.clear()
    with running(app) as url:
        assert httpx2.get(f"{url}/health").status_code == 200
        reply = httpx2.post(f"{url}/v1/completions", json=LONG, timeout=10)
        assert reply.status_code == 500
        reply = httpx2.get(f"{url}/health")
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_dead"
        assert "--step-timeout-s" in reply.json()["error"]["message"]
        reply = httpx2.post(f"{url}/v1/completions", json=LONG)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
        wait_until(lambda: failures)
        executor.gate.set()  # a step that ends after all changes nothing any more
        wait_until(lambda: not app.state.relay._handle._thread.is_alive())
        assert httpx2.get(f"{url}/health").status_code == 503
    assert len(failures) == 1 and engine.computing is None


def test_a_slow_step_within_its_limit_is_left_alone():
    executor = SpeakingExecutor(step_s=0.6)
    app, _ = make_app(executor, step_timeout_s=30.0)
    with running(app) as url:
        reply = httpx2.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 2})
        assert reply.status_code == 200
        assert httpx2.get(f"{url}/health").status_code == 200


def test_one_bad_request_beside_others_is_a_500_of_its_own():
    class Picky(SpeakingExecutor):
        def submit(self, batch):
            if any(98 in r.token_ids for r in batch.requests):  # the letter b
                raise RuntimeError("secret")
            return super().submit(batch)

    executor = Picky(step_s=0.01)
    app, _ = make_app(executor)
    with running(app) as url:
        replies = {}

        def ask(prompt):
            body = {**LONG, "prompt": prompt, "max_tokens": 20, "seed": 2}  # it says c
            replies[prompt] = httpx2.post(f"{url}/v1/completions", json=body, timeout=30)

        threads = [threading.Thread(target=ask, args=(p,)) for p in ("aaaa", "bbbb", "dddd")]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
    assert {p: r.status_code for p, r in replies.items()} == {"aaaa": 200, "bbbb": 500, "dddd": 200}
    assert {r.json()["choices"][0]["text"] for r in replies.values() if r.is_success} == {"c" * 20}


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "on", None, 1e9])
def test_a_timeout_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="--step-timeout-s"):
        ServerSettings(served_model_name=MODEL, step_timeout_s=value)
