"""Hostile requests beside a healthy client: what each attack costs the neighbour, and the server.

    python benchmarks/hostile.py
    python benchmarks/hostile.py --duetto path/to/an/older/.venv/bin/python --only tokenize,reply

A random model is made (context 8192, vocabulary 32,000) and served on 127.0.0.1 by the interpreter
given. Each attack is a bounded number of requests, for at most `--seconds`; beside it the healthy
client asks for a token at a time, with prompts of 5 KB and of a word. `stall` is the longest time
for which the server's event loop was busy in one go, by a heartbeat in its process, and `stall_cpu`
the most that it computed itself meanwhile, which other work on the machine does not lengthen; `rss`
is how much its memory grew at most. An attack on the steps has a plain twin, which asks for as many
tokens without what is hostile: what it makes the neighbour wait is the scheduler's order. The last
line of stdout is one JSON document.
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
MODEL = "hostile"
MIB = 2**20
CONFIG: Json = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while"),
    *("it", "rains", "in", "spain", "for", "forty", "days"),
)
WITH_TEXT = 2000  # tokens of the made tokenizer; ids beyond have no text
LARGE_REPLIES = frozenset({"reply", "unread", "unread_many", "unread_whole"})
HEARTBEAT_S = 0.002


@dataclass(frozen=True, slots=True)
class Server:
    port: int
    pid: int
    beats: Path

    def stall_ms(self, start: float, end: float) -> tuple[float, float]:
        """The longest stall of the event loop that ended between two times of the clock, and the
        most that its thread computed in one."""
        lines = [map(float, line.split()) for line in self.beats.read_text().splitlines()]
        stalls = [each for at, *each in lines if start <= at <= end] or [[0.0, 0.0]]
        longest, most = map(max, zip(*stalls, strict=True))
        return round(1000 * longest, 1), round(1000 * most, 1)

    def rss_mib(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB


@dataclass(frozen=True, slots=True)
class Attack:
    """`bodies` are sent at once, each by a client of its own, which reads all, or nothing."""

    path: str
    bodies: list[Json]
    reads: bool = True
    twin: list[Json] | None = None
    probe_bytes: int = 5000
    encoded: list[bytes] | None = None  # instead of bodies, where they are no plain JSON


@dataclass(slots=True)
class Result:
    alone_ms: float = 0.0
    alone_stall_ms: float = 0.0  # what this machine's other work makes of it
    median_ms: float = 0.0
    worst_ms: float = 0.0
    num_probes: int = 0
    refused: int = 0  # of the healthy client's
    twin_median_ms: float | None = None
    twin_worst_ms: float | None = None
    stall_ms: float = 0.0
    stall_cpu_ms: float = 0.0
    rss_mib: float = 0.0
    attack_s: float = 0.0
    largest_reply: int = 0
    replies: dict[str, int] = field(default_factory=dict)  # status -> how many; "cut": broken off


def text(num_bytes: int, seed: int) -> str:
    draw = random.Random(seed)
    words: list[str] = []
    size = 0
    while size < num_bytes:
        words.append(draw.choice(WORDS))
        size += len(words[-1]) + 1
    return " ".join(words)[:num_bytes]


def post(server: Server, path: str, data: bytes, timeout: float) -> tuple[str, int]:
    """The status and the size of the reply."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        size = 0
        while part := reply.read(2**18):
            size += len(part)
        return str(reply.status), size
    except (OSError, http.client.HTTPException):
        return "cut", 0
    finally:
        connection.close()


@contextmanager
def unread(server: Server, path: str, data: bytes) -> Iterator[None]:
    """A client that sends its request and never reads."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        yield


def probe(server: Server, num_bytes: int, seed: int) -> tuple[str, float]:
    prompt = text(num_bytes, seed) if num_bytes > 10 else WORDS[seed % len(WORDS)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    start = time.monotonic()
    status, _ = post(server, "/v1/completions", json.dumps(body).encode(), 120.0)
    return status, time.monotonic() - start


def encoded(attack: Attack, bodies: list[Json]) -> list[bytes]:
    return attack.encoded or [json.dumps({"model": MODEL, **body}).encode() for body in bodies]


def beside(
    server: Server, attack: Attack, datas: list[bytes], seconds: float, result: Result
) -> list[float]:
    """Run an attack and the healthy client beside it; the client's latencies."""
    counts: Counter[str] = Counter()
    threads: list[threading.Thread] = []
    gone = threading.Event()

    def strike(data: bytes) -> None:
        if attack.reads:
            status, size = post(server, attack.path, data, 120.0)
            counts[status] += 1
            result.largest_reply = max(result.largest_reply, size)
            return
        try:
            with unread(server, attack.path, data):
                gone.wait(seconds)
        except OSError:
            counts["cut"] += 1

    before, most, start = server.rss_mib(), 0.0, time.monotonic()
    for data in datas:
        threads.append(threading.Thread(target=strike, args=(data,)))
        threads[-1].start()
    time.sleep(0.1)
    latencies: list[float] = []
    seed = int(start * 1000)
    while not latencies or (
        any(t.is_alive() for t in threads) and time.monotonic() - start < seconds
    ):
        seed += 1
        status, latency = probe(server, attack.probe_bytes, seed)
        latencies.append(latency)
        result.refused += status != "200"
        most = max(most, server.rss_mib() - before)
        time.sleep(0.02)
    gone.set()
    for thread in threads:
        thread.join()
    end = time.monotonic()
    time.sleep(0.2)
    longest, most_cpu = server.stall_ms(start, end)
    result.stall_ms = max(result.stall_ms, longest)
    result.stall_cpu_ms = max(result.stall_cpu_ms, most_cpu)
    result.rss_mib = round(max(result.rss_mib, most, server.rss_mib() - before), 1)
    result.attack_s = round(end - start, 2)
    result.replies = dict(counts)
    return latencies


def measure(server: Server, attack: Attack, seconds: float) -> Result:
    result, twin = Result(), Result()
    for seed in range(3):
        probe(server, attack.probe_bytes, seed)
    start = time.monotonic()
    alone = [probe(server, attack.probe_bytes, 100 + seed)[1] for seed in range(7)]
    result.alone_stall_ms = server.stall_ms(start, time.monotonic())[0]
    result.alone_ms = round(1000 * statistics.median(alone), 1)
    if attack.twin is not None:
        datas = [json.dumps({"model": MODEL, **body}).encode() for body in attack.twin]
        waits = beside(server, attack, datas, seconds, twin)
        result.twin_median_ms = round(1000 * statistics.median(waits), 1)
        result.twin_worst_ms = round(1000 * max(waits), 1)
    waits = beside(server, attack, encoded(attack, attack.bodies), seconds, result)
    result.median_ms = round(1000 * statistics.median(waits), 1)
    result.worst_ms = round(1000 * max(waits), 1)
    result.num_probes = len(waits)
    return result


def attacks() -> dict[str, Callable[[], Attack]]:
    """Made when they are used: some are large."""
    completions = "/v1/completions"
    steps = {"prompt": text(40, 1), "max_tokens": 40, "n": 32, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "seed": 1}
    scored = {"prompt": text(7000, 2), "max_tokens": 1, "n": 32}
    words = [f"{a}{b}" for a in WORDS for b in WORDS]
    ids = random.Random(0).sample(range(3, 1990), 1000)

    def beside_plain(plain: Json, **more: Any) -> Attack:
        return Attack(completions, [{**plain, **more}], twin=[plain], probe_bytes=5)

    def streams(n: int) -> Attack:
        body = {**steps, "n": n, "max_tokens": 2000, "logprobs": 20, "stream": True}
        return Attack(completions, [body] * (64 // n), reads=False, probe_bytes=5)

    lists = b'{"model":"hostile","prompt":[' + b"[]," * 1_390_000 + b"[]]}"
    return {
        "tokenize": lambda: Attack(
            "/tokenize", [{"prompt": text(2 * MIB, i % 3)} for i in range(24)]
        ),
        "detokenize": lambda: Attack("/detokenize", [{"tokens": ids * 260}] * 12),
        "token_strs": lambda: Attack(
            "/tokenize", [{"prompt": text(2 * MIB, 3), "return_token_strs": True}] * 2
        ),
        "lists": lambda: Attack(completions, [], encoded=[lists] * 4),
        "wrong": lambda: Attack(completions, [], encoded=[b'{"' + b"x" * 4 * MIB + b'":1}'] * 4),
        "bias": lambda: Attack(
            completions,
            [{"prompt": "a", "max_tokens": 1, "logit_bias": {str(i): 1 for i in range(31_900)}}]
            * 4,
        ),
        "reply": lambda: Attack(
            "/v1/chat/completions",
            [{**chat, "max_tokens": 320, "n": 48, "logprobs": True, "top_logprobs": 20}],
            probe_bytes=5,
        ),
        "products": lambda: Attack(
            completions, [{**steps, "max_tokens": 2000, "n": 128, "logprobs": 20}], probe_bytes=5
        ),
        "prompt_logprobs": lambda: beside_plain(scored, prompt_logprobs=20),
        "echo": lambda: beside_plain(scored, logprobs=20, echo=True, n=4),
        "logprobs": lambda: beside_plain(steps, logprobs=20),
        "bad_words": lambda: beside_plain(steps, bad_words=words[:250]),
        "stop": lambda: beside_plain(steps, stop=[c * 450 for c in "abcdefghijklmnop"]),
        "small_bias": lambda: beside_plain(steps, logit_bias={str(i): 1 for i in ids}),
        "penalties": lambda: beside_plain(
            {**steps, "prompt": text(7000, 3)}, repetition_penalty=1.1, presence_penalty=0.1
        ),
        "filters": lambda: beside_plain(steps, top_p=0.999, top_k=31_000, min_p=1e-9),
        "min_tokens": lambda: beside_plain(steps, min_tokens=40, stop_token_ids=ids),
        "unread": lambda: streams(16),
        "unread_many": lambda: streams(1),
        "unread_whole": lambda: Attack(
            completions,
            [{**steps, "max_tokens": 200, "n": 16, "logprobs": 20}] * 4,
            reads=False,
            probe_bytes=5,
        ),
    }


@contextmanager
def serving(python: str, vocab_size: int, seconds: float, *more: str) -> Iterator[Server]:
    """`more`: options of `duetto serve`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab_size}))
        model = root / MODEL
        make = [python, "-m", "duetto", "make-model", str(root / "config.json"), str(model)]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        beats = root / "beats"
        beats.touch()
        script = str(Path(__file__).resolve())
        command = [python, script, "--beats", str(beats), "--", "serve", str(model)]
        null = subprocess.DEVNULL
        process = subprocess.Popen([*command, "--port", str(port), *more], stdout=null, stderr=null)
        try:
            server = Server(port, process.pid, beats)
            _wait_until_ready(server, process, 60.0)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(server: Server, process: "subprocess.Popen[bytes]", seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if probe(server, 5, 0)[0] == "200":
            return
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def serve_with_heartbeat(beats: Path, arguments: list[str]) -> None:
    """Runs in the server's process: notes each time that the event loop was busy for long."""
    import asyncio  # noqa: PLC0415 - this and the next are the other process's

    import uvicorn  # noqa: PLC0415

    from duetto.cli.app import main  # noqa: PLC0415

    startup = uvicorn.Server.startup

    async def startup_with_heartbeat(self: uvicorn.Server, **more: Any) -> None:
        loop, file = asyncio.get_running_loop(), beats.open("a", buffering=1)

        def beat(due: float, computed: float) -> None:
            now, by_now = time.monotonic(), time.thread_time()
            if now - due > HEARTBEAT_S:
                file.write(f"{now} {now - due} {by_now - computed}\n")
            loop.call_later(HEARTBEAT_S, beat, now + HEARTBEAT_S, time.thread_time())

        beat(time.monotonic(), time.thread_time())
        await startup(self, **more)

    uvicorn.Server.startup = startup_with_heartbeat  # type: ignore[method-assign]
    sys.argv = ["duetto", *arguments]
    main()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duetto", default=sys.executable, help="interpreter that has duetto")
    parser.add_argument("--seconds", type=float, default=12.0, help="of one attack, at most")
    parser.add_argument("--only", default="", help=f"some of {', '.join(attacks())}")
    parser.add_argument("--beats", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.beats is not None:
        serve_with_heartbeat(options.beats, options.rest)
        return
    chosen = options.only.split(",") if options.only else list(attacks())
    results: dict[str, Result] = {}
    for name in chosen:
        vocab_size = WITH_TEXT if name in LARGE_REPLIES else CONFIG["vocab_size"]
        with serving(options.duetto, vocab_size, 20.0) as server:
            results[name] = measure(server, attacks()[name](), options.seconds)
        print(f"{name}: {asdict(results[name])}", flush=True)
    print(json.dumps({name: asdict(result) for name, result in results.items()}))


if __name__ == "__main__":
    main()
