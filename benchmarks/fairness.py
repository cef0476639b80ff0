"""One client floods a server; another asks small things. What does the second one get?

    python benchmarks/fairness.py
    python benchmarks/fairness.py --before path/to/an/older/.venv/bin/python

A server listens on 127.0.0.1. The first client has 30 connections, each of which asks for 16
answers of 150 tokens again and again, and waits a little when it is refused. The second asks for 8
tokens every quarter of a second, one request at a time. They are told apart by keys (`--by keys`)
or by their addresses 127.0.0.1 and 127.0.0.2 (`--by addresses`). `answered` counts the second's
requests with an answer within 2 seconds. `alone` is the same without the flood. The last line of
stdout is one JSON document.
"""

import argparse
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CONNECTIONS, NUM_ANSWERS, NUM_TOKENS = 30, 16, 150
SMALL_TOKENS, PERIOD_S, LIMIT_S = 8, 0.25, 2.0
MODEL = "shared"
KEYS = ("first", "second")
ADDRESSES = ("127.0.0.1", "127.0.0.2")


@dataclass(slots=True)
class Outcome:
    """What came of one client's requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of those with an answer
    num_tokens: int = 0


class Client:
    """One of two; `number` says which."""

    def __init__(self, port: int, number: int, by: str) -> None:
        self._port, self._number, self._by = port, number, by
        self.outcome = Outcome()

    def ask(self, body: dict[str, Any], timeout: float = 60.0) -> int:
        """The status of the reply; 0 if none came."""
        source = (ADDRESSES[self._number], 0) if self._by == "addresses" else None
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._port, timeout=timeout, source_address=source
        )
        headers = {"Content-Type": "application/json"}
        if self._by == "keys":
            headers["Authorization"] = f"Bearer {KEYS[self._number]}"
        content = json.dumps({"model": MODEL, **body})
        start = time.monotonic()
        try:
            connection.request("POST", "/v1/completions", content, headers)
            reply = connection.getresponse()
            told = reply.read()
        except OSError:
            self.outcome.statuses[0] += 1
            return 0
        finally:
            connection.close()
        self.outcome.statuses[reply.status] += 1
        if reply.status == 200:
            self.outcome.seconds.append(time.monotonic() - start)
            self.outcome.num_tokens += json.loads(told)["usage"]["completion_tokens"]
        return reply.status


def flood(client: Client, number: int, done: threading.Event) -> None:
    body = {"prompt": f"Flood {number}", "n": NUM_ANSWERS, "max_tokens": NUM_TOKENS}
    while not done.is_set():
        if client.ask({**body, "ignore_eos": True, "temperature": 1.0}) != 200:
            done.wait(0.2)


def ask_small(client: Client, seconds: float) -> None:
    end = time.monotonic() + seconds
    number = 0
    while (now := time.monotonic()) < end:
        number += 1
        body = {"prompt": f"Small {number}", "max_tokens": SMALL_TOKENS, "ignore_eos": True}
        client.ask(body)
        time.sleep(max(0.0, now + PERIOD_S - time.monotonic()))


@contextmanager
def served(python: str, model: str | None, by: str) -> Iterator[int]:
    """A server of its own; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "duetto", "serve", *([model] if model else []), "--port", str(port)]
    command += ["--served-model-name", MODEL]
    for key in KEYS if by == "keys" else ():
        command += ["--api-key", key]
    null = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=null, stderr=null) as process:
        try:
            wait_until_ready(port, process)
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise SystemExit("the server does not start")


def measure(python: str, options: argparse.Namespace) -> dict[str, Any]:
    with served(python, options.model, options.by) as port:
        alone = Client(port, 1, options.by)
        ask_small(alone, options.seconds / 4)
        first, second = Client(port, 0, options.by), Client(port, 1, options.by)
        done = threading.Event()
        threads = [
            threading.Thread(target=flood, args=(first, number, done), daemon=True)
            for number in range(CONNECTIONS)
        ]
        for each in threads:
            each.start()
        time.sleep(1.0)  # the flood comes first
        ask_small(second, options.seconds)
        done.set()
    asked = sum(second.outcome.statuses.values())
    answered = sum(seconds <= LIMIT_S for seconds in second.outcome.seconds)
    return {
        "asked": asked,
        "answered_in_time": answered,
        "share": answered / max(asked, 1),
        "median_s": _median(second.outcome),
        "alone_median_s": _median(alone.outcome),
        "statuses": dict(second.outcome.statuses),
        "flood_statuses": dict(first.outcome.statuses),
        "flood_tokens": first.outcome.num_tokens,
    }


def _median(outcome: Outcome) -> float | None:
    return round(statistics.median(outcome.seconds), 3) if outcome.seconds else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint; default: the reader that ships")
    parser.add_argument("--by", choices=("keys", "addresses"), default="keys")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the flood")
    parser.add_argument("--before", help="an interpreter with an older duetto, to compare")
    options = parser.parse_args()
    found = {}
    for name, python in (("before", options.before), ("after", sys.executable)):
        if python is None:
            continue
        found[name] = measure(python, options)
        print(
            f"{name}: {found[name]['answered_in_time']} of {found[name]['asked']} small requests "
            f"answered within {LIMIT_S:g} s; statuses {found[name]['statuses']}"
        )
    document = {
        "benchmark": "fairness",
        "by": options.by,
        "model": options.model or "duetto-demo",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **found,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
