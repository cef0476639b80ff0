"""What a streamed token costs the server, by API; and beside older code, in turns.

    git worktree add /tmp/before a016f45^      (0.1.0, before there were translators)
    python benchmarks/streams.py --before /tmp/before

The real server and engine, without sockets and without a model: an executor says a letter a step.
Microseconds of CPU for a token, of the event loop's thread alone (relay, exchange, translator,
encoding) and of the whole process (the engine too). Each turn is a process of its own; turns of all
kinds alternate, and the median is told. The last line on stdout is one JSON document.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
Json = dict[str, Any]
STREAMS = 8  # at once
STEP_S = 0.002  # so that the event loop is never behind, and each token is an event
SAID = {"role": "user", "content": "hello"}
TOOL = {"type": "object", "properties": {"city": {"type": "string"}}}
BODIES: dict[str, tuple[str, Json]] = {
    "chat": ("/v1/chat/completions", {"messages": [SAID]}),
    "completion": ("/v1/completions", {"prompt": "hello"}),
    "chat, parsed": ("/v1/chat/completions", {"messages": [SAID]}),
    "chat, tools": (
        "/v1/chat/completions",
        {
            "messages": [SAID],
            "tools": [{"type": "function", "function": {"name": "get", "parameters": TOOL}}],
        },
    ),
    "Responses": ("/v1/responses", {"input": "hello", "store": False}),
    "Messages": ("/v1/messages", {"messages": [SAID]}),
}
BEFORE = ("chat", "completion")  # what the older code has


# --- one turn ------------------------------------------------------------------------------------


async def stream(app: Any, path: str, body: Json) -> bytes:
    data, sent, parts = json.dumps(body).encode(), False, list[bytes]()

    async def receive() -> Json:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # nobody hangs up
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
        parts.append(message.get("body", b""))

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(data)).encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
        "extensions": {},
    }
    await app(scope, receive, send)
    return b"".join(parts)


def make_app(kind: str) -> Any:
    from server import fakes_server  # noqa: PLC0415 - of the code that is measured

    config = replace(fakes_server.CONFIG, num_blocks=STREAMS * 128, max_num_seqs=STREAMS)
    more: Json = {}
    if kind in ("chat, parsed", "chat, tools"):
        from duetto.dialects.choose import choose_dialects  # noqa: PLC0415
        from duetto.engine.speech import Speech  # noqa: PLC0415

        named = {"tool_call_parser": "hermes", "reasoning_parser": "think"}
        more["speech"] = Speech(choose_dialects(None, **named))
    app, _ = fakes_server.make_app(fakes_server.SpeakingExecutor(step_s=STEP_S), config, **more)
    return app


async def turn(kind: str, num_tokens: int, rounds: int) -> Json:
    path, body = BODIES[kind]
    limit = "max_output_tokens" if kind == "Responses" else "max_tokens"
    body = {**body, limit: num_tokens, "stream": True, "model": "fake"}
    if kind not in ("Responses", "Messages"):
        body["ignore_eos"] = True
    app = make_app(kind)
    loop_us, process_us = list[float](), list[float]()
    async with app.router.lifespan_context(app):
        for number in range(rounds + 1):
            before = time.thread_time(), time.process_time()
            replies = await asyncio.gather(*[stream(app, path, body) for _ in range(STREAMS)])
            after = time.thread_time(), time.process_time()
            for reply in replies:
                assert num_tokens <= reply.count(b"data: ") <= num_tokens + 12, reply[-300:]
            if number:  # the first warms up
                scale = 1e6 / (num_tokens * STREAMS)
                loop_us.append(scale * (after[0] - before[0]))
                process_us.append(scale * (after[1] - before[1]))
    return {"loop_us": median(loop_us), "process_us": median(process_us)}


# --- all of them ---------------------------------------------------------------------------------


def ask_turn(tree: Path, kind: str, asked: argparse.Namespace) -> Json:
    path = os.pathsep.join([str(tree / "src"), str(tree / "tests")])
    numbers = ["--num-tokens", str(asked.num_tokens), "--rounds", str(asked.rounds)]
    command = [sys.executable, __file__, "--kind", kind, *numbers]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: Json = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("code")).is_relative_to(tree), "it measured other code"
    return found


def compared(asked: argparse.Namespace) -> Json:
    variants = {kind: (ROOT, kind) for kind in BODIES}
    if asked.before is not None:
        variants |= {f"{kind}, before": (asked.before.resolve(), kind) for kind in BEFORE}
    measured: dict[str, list[Json]] = {name: [] for name in variants}
    for _ in range(asked.turns):
        for name, (tree, kind) in variants.items():
            measured[name].append(ask_turn(tree, kind, asked))
    found: Json = {}
    for name, turns in measured.items():
        found[name] = {key: round(median(t[key] for t in turns), 2) for key in turns[0]}
    base = found["chat, before" if asked.before is not None else "chat"]
    for each in found.values():
        each |= {f"{key}_ratio": round(each[key] / base[key], 3) for key in base if key in each}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of older code, to compare with")
    parser.add_argument("--num-tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5, help="of a turn, beside one that warms up")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.kind is not None:
        import duetto  # noqa: PLC0415

        found = asyncio.run(turn(asked.kind, asked.num_tokens, asked.rounds))
        print(json.dumps({**found, "code": duetto.__file__}))
        return
    found = compared(asked)
    for name, each in found.items():
        print(f"{name}: {each}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
