"""Part `server`: `duetto serve` under `duetto bench serve`, many streams with long prompts that
arrive beside them, and the longest gap between two tokens of a stream."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from gpu.bench import ROOT, Bench
from gpu.checkpoint import checkpoint
from gpu.engine import engine_args

START_S = 60.0
OF_STEP = 1.8  # of a decode step, what steps beside a prompt may take; the promise is twice


def run(bench: Bench) -> dict[str, Any]:
    bench.close()
    streams = bench.sizes.streams
    step_s = _step_s(bench)
    target_ms = OF_STEP * step_s * 1e3
    with _server(bench, target_ms) as url:
        if not bench.rehearse:  # there, kernels are compiled and prices learned
            _drive(url, bench, num_prompts=streams)
        found = _drive(url, bench, num_prompts=(1 if bench.rehearse else 3) * streams)
    worst_ms = found["max_itl_ms"]
    return {
        "streams": streams,
        "target_itl_ms": target_ms,
        "step_ms": step_s * 1e3,
        "worst_itl_ms": worst_ms,
        "p99_itl_ms": found["p99_itl_ms"],
        "median_itl_ms": found["median_itl_ms"],
        "worst_of_step": worst_ms / (step_s * 1e3),
        "median_ttft_ms": found["median_ttft_ms"],
        "output_throughput": found["output_throughput"],
        "completed": found["completed"],
    }


def _step_s(bench: Bench) -> float:
    """Of the streams alone, by the part `decode`."""
    steps = bench.found.get("decode", {}).get("steps", ())
    for one in steps:
        if one["at"][0] == bench.sizes.streams:
            step_s: float = one["ours_s"]
            return step_s
    raise LookupError("the part `decode` must be done first: run it with --only decode")


@contextmanager
def _server(bench: Bench, target_ms: float) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = engine_args(bench) | {"target_itl": f"{target_ms:.3f}"}
    flags = [text for name, value in args.items() for text in _flag(name, value)]
    command = [sys.executable, "-m", "duetto", "serve", str(checkpoint(bench)), *flags]
    process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=sys.stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, 20 * START_S if bench.rehearse else START_S)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _flag(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def _wait(process: subprocess.Popen[bytes], url: str, limit_s: float) -> None:
    end = monotonic() + limit_s
    while monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"duetto serve ended with {process.returncode}")
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            sleep(0.1)
    raise RuntimeError(f"duetto serve did not answer within {limit_s:.0f} s")


def _drive(url: str, bench: Bench, num_prompts: int) -> dict[str, Any]:
    sizes = bench.sizes
    flags = {
        "base-url": url,
        "dataset-name": "random",
        "num-prompts": num_prompts,
        "random-input-len": sizes.prompt,
        "random-output-len": sizes.answer,
        "max-concurrency": sizes.streams,
        "metric-percentiles": "50,99",
    }
    texts = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "duetto", "bench", "serve", *texts, "--ignore-eos", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"duetto bench serve ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
