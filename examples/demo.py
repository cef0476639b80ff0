"""What `make demo` runs: serve a model, ask it about documents through the `openai` client, stop.

The first question takes two of three documents: one says who founded a company, another where "the
founder" lives. The second question is about the same documents, so the server finds most of its
prompt in the prefix cache and says how much.

    python examples/demo.py [MODEL_DIRECTORY]

Without a model it is the small reader that ships with Duetto.
"""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import pairwise
from socket import AF_INET, SOCK_STREAM, socket
from statistics import median

from openai import OpenAI

DUETTO = [sys.executable, "-m", "duetto"]
QUIET = ("--log-level", "warning")  # or its lines would stand among the answers
DOCUMENTS = """\
Document: Rossteel was founded by Halvard.
Document: The founder lives in Normoor.
Document: Nanchem is based in Gilcross.
"""
QUESTIONS = ("Where does the founder of Rossteel live?", "Where is Nanchem based?")


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*DUETTO, "serve", *sys.argv[1:2], "--port", str(port), *QUIET])
    try:
        wait_until_healthy(server, url)
        ask_all(OpenAI(base_url=f"{url}/v1", api_key="none"))
    finally:
        server.terminate()
        server.wait(timeout=30)
    print("The server has stopped.")


def ask_all(client: OpenAI) -> None:
    name = client.models.list().data[0].id
    for question in QUESTIONS:
        prompt = f"{DOCUMENTS}Question: {question}"
        print(f"\n{prompt}\nAnswer: ", end="", flush=True)
        stream_answer(client, name, prompt)


def stream_answer(client: OpenAI, model: str, prompt: str) -> None:
    """Print an answer as it comes, then its timings as this client saw them."""
    start = time.perf_counter()
    times, usage = [], None
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
            print(chunk.choices[0].delta.content, end="", flush=True)
    gaps = [b - a for a, b in pairwise(times)] or [0.0]  # an answer can come in one piece
    cached = usage.prompt_tokens_details.cached_tokens
    print(
        f"\n  TTFT {1e3 * (times[0] - start):.1f} ms, median ITL {1e3 * median(gaps):.1f} ms, "
        f"{usage.prompt_tokens} prompt tokens of which {cached} cached, "
        f"{usage.completion_tokens} generated"
    )


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
