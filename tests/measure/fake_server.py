"""A tiny OpenAI-compatible server for tests of the client: its behaviour is named by the prompt."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

GAP_S = 0.05  # between tokens
TEMPLATE_TOKENS = 6  # that a chat has beside its text
PREDICTED = {
    "completion_tokens_details": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 2}
}
SPECULATED = {
    "speculation": {
        "steps": 2,
        "proposed_per_position": [2, 2, 1],
        "accepted_per_position": [2, 1, 0],
        "saved_ms": 1.5,
    }
}
TIMINGS = {"drafted": SPECULATED, "predicted": {"speculation": True}}


class FakeServer:
    """Streams max_tokens tokens, GAP_S apart. Text prompts ask for other behaviours.

    A word is a token, and "tN" is the token N. Answers that may end do so after `ends_after`.
    """

    def __init__(
        self,
        *,
        has_counts: bool = True,
        counts_chats: bool = True,
        spells: bool = True,
        ends_after: int | None = None,
    ) -> None:
        self.has_counts = has_counts  # whether it knows continuous_usage_stats
        self.counts_chats = counts_chats  # whether /tokenize takes messages
        self.spells = spells  # whether it has /detokenize
        self.ends_after = ends_after
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_active = 0
        self.most_active = 0
        self.base_url = ""

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        counts = body["stream_options"].get("continuous_usage_stats", False)
        if counts and not self.has_counts:
            return _error(400, "unknown field continuous_usage_stats")
        if body.get("prompt") == "refuse":
            return _error(400, "prompt: must not be refused")
        if body.get("prompt") == "html":
            return Response("<html>hello</html>", media_type="text/html")
        return StreamingResponse(self._events(body, counts), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], counts: bool) -> AsyncIterator[str]:
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        prompt, num_tokens = body.get("prompt"), self._num_tokens(body)
        num_prompt = _num_prompt_tokens(body)
        try:
            if "messages" in body:
                yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for number in range(1, num_tokens + 1):
                await asyncio.sleep(GAP_S)
                if prompt == "stall" and number == 2:
                    yield ": heartbeat\n\n"
                    await asyncio.sleep(60)
                if prompt == "break" and number == 2:
                    return
                if prompt == "fail" and number == 2:
                    yield _event({"error": {"message": "the engine failed"}})
                    return
                if prompt == "garbage" and number == 2:
                    yield "data: {nonsense\n\n"
                    return
                yield _event(self._chunk(body, number, counts))
            yield _event(
                {
                    "choices": [],
                    "usage": _usage(num_prompt, num_tokens * 2 if prompt == "wide" else num_tokens)
                    | (PREDICTED if prompt in ("drafted", "predicted") else {}),
                }
            )
            yield "data: [DONE]\n\n"
        finally:
            self.num_active -= 1

    def _chunk(self, body: dict[str, Any], number: int, counts: bool) -> dict[str, Any]:
        """A chunk of one token; for the prompt "wide" of two."""
        width = _width(body)
        is_last = number == self._num_tokens(body)
        is_whole = number == body["max_tokens"]
        reason = ("length" if is_whole else "stop") if is_last else None
        said = {"delta": {"content": "x"}} if "messages" in body else {"text": "x"}
        choice = {"index": 0, **said, "finish_reason": reason}
        timings = TIMINGS.get(str(body.get("prompt"))) if is_last else None
        if body.get("return_token_ids"):
            choice["token_ids"] = [7] * width
        usage = _usage(_num_prompt_tokens(body), number * width) if counts else None
        return {"id": "x", "object": "x", "choices": [choice], "usage": usage, "timings": timings}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake-model"}]})

    def _num_tokens(self, body: dict[str, Any]) -> int:
        most: int = body["max_tokens"]
        ends = None if body.get("ignore_eos") else self.ends_after
        return most if ends is None else min(most, ends)

    async def tokenize(self, request: Request) -> Response:
        body = await request.json()
        if "messages" in body and not self.counts_chats:
            return _error(400, "prompt: is required")
        words = body.get("prompt", "").split()
        ids = [int(word[1:]) if word[1:].isdecimal() else 0 for word in words]
        count = _num_prompt_tokens(body)
        return JSONResponse({"count": count, "tokens": ids, "max_model_len": 4096})

    async def detokenize(self, request: Request) -> Response:
        if not self.spells:
            return _error(404, "no such path")
        tokens = (await request.json())["tokens"]
        return JSONResponse({"prompt": " ".join(f"t{token}" for token in tokens)})

    @contextmanager
    def running(self) -> Iterator["FakeServer"]:
        routes = [
            Route("/v1/completions", self.generate, methods=["POST"]),
            Route("/v1/chat/completions", self.generate, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", ws="none")
        server = uvicorn.Server(config)
        socket = config.bind_socket()
        self.base_url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
            socket.close()


def _width(body: dict[str, Any]) -> int:
    """Tokens per chunk."""
    return 2 if body.get("prompt") == "wide" else 1


def _num_prompt_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        return TEMPLATE_TOKENS + sum(len(m["content"].split()) for m in body["messages"])
    prompt = body["prompt"]
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def _usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x"}}, status)
