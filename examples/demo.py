"""What `make demo` runs: serve a model, ask it twice through the `openai` client, and stop.

The first answer is computed from nothing. The second continues the conversation, so the server
finds most of its prompt in the prefix cache and says how much.

    python examples/demo.py [MODEL_DIRECTORY]
"""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path
from socket import AF_INET, SOCK_STREAM, socket
from statistics import median

from openai import OpenAI

DUETTO = [sys.executable, "-m", "duetto"]
QUESTIONS = (
    "What are the two phases of inference, and which of them is bound by memory?",
    "And which by arithmetic?",
)


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".demo/tiny")
    if not model.exists():
        print(f"No model named: writing a tiny one with random weights to {model}", flush=True)
        subprocess.run([*DUETTO, "make-model", "tiny", str(model)], check=True)
        print(
            "Its weights are random, so what it says is noise; how it is served is real.",
            flush=True,
        )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*DUETTO, "serve", str(model), "--port", str(port)])
    try:
        wait_until_healthy(server, url)
        converse(OpenAI(base_url=f"{url}/v1", api_key="none"))
    finally:
        server.terminate()
        server.wait(timeout=30)
    print("The server has stopped.")


def converse(client: OpenAI) -> None:
    name = client.models.list().data[0].id
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"\nuser: {question}\nassistant: ", end="", flush=True)
        messages.append({"role": "assistant", "content": stream_answer(client, name, messages)})


def stream_answer(client: OpenAI, model: str, messages: list[dict[str, str]]) -> str:
    """Print an answer as it comes, then its timings as this client saw them; return its text."""
    start = time.perf_counter()
    pieces, times, usage = [], [], None
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
            pieces.append(chunk.choices[0].delta.content)
            print(pieces[-1], end="", flush=True)
    gaps = [b - a for a, b in pairwise(times)]
    cached = usage.prompt_tokens_details.cached_tokens
    print(
        f"\n  TTFT {1e3 * (times[0] - start):.1f} ms, median ITL {1e3 * median(gaps):.1f} ms, "
        f"{usage.prompt_tokens} prompt tokens of which {cached} cached, "
        f"{usage.completion_tokens} generated"
    )
    return "".join(pieces)


def wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except urllib.error.URLError:  # not listening yet, or not ready yet
            time.sleep(0.1)
    sys.exit("the server was not healthy within 60 s")


def free_port() -> int:
    with socket(AF_INET, SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
