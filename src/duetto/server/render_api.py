"""What a request would give the engine, without giving it: vLLM's routes of that name.

Knows no engine.
"""

from collections.abc import Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.core.text import TextCodec
from duetto.server.answering import Answering
from duetto.server.apis.asked import AskedChat, AskedPrompts
from duetto.server.apis.shapes import ChatShape, CompletionShape
from duetto.server.door import EncodedPrompt, Job
from duetto.server.http.json_parts import Json, PartsResponse, json_parts, packed

TOKEN_BYTES = 16  # roughly a token's id and text in a reply


class RenderApi:
    def __init__(
        self,
        answering: Answering,
        read_completion: Callable[[bytes], AskedPrompts],
        read_chat: Callable[[bytes], AskedChat],
    ) -> None:
        """Both read a body as the real route does, on any thread."""
        self._answering = answering
        self._read_completion = read_completion
        self._read_chat = read_chat

    def routes(self) -> list[Route]:
        post = partial(Route, methods=["POST"])
        return [
            post("/v1/completions/render", self.completions),
            post("/v1/chat/completions/render", self.chat_completions),
        ]

    async def completions(self, request: Request) -> Response:
        """A list with an entry for each prompt."""
        read = self._read_completion
        async with self._answering.drafted(request, read, is_submitted=False) as drafted:
            _, job, arrival = drafted
        head = self._head(CompletionShape.id_prefix + arrival.name)
        return await self._reply(job, lambda: _entries(head, job, self._answering.codec))

    async def chat_completions(self, request: Request) -> Response:
        read = self._read_chat
        async with self._answering.drafted(request, read, is_submitted=False) as drafted:
            _, job, arrival = drafted
        head = self._head(ChatShape.id_prefix + arrival.name)
        return await self._reply(job, lambda: _entries(head, job, self._answering.codec)[0])

    def _head(self, request_id: str) -> Json:
        return {"request_id": request_id, "model": self._answering.settings.served_model_name}

    async def _reply(self, job: Job, make: Callable[[], Json | list[Json]]) -> Response:
        num_tokens = sum([len(prompt.token_ids) for prompt in job.prompts])
        work = self._answering.work
        parts = work.reply(lambda: packed(json_parts(make())), TOKEN_BYTES * num_tokens)
        return PartsResponse(await parts)


def _entries(head: Json, job: Job, codec: TextCodec) -> list[Json]:
    """vLLM's names, and `prompt` and `max_tokens`, which are ours. Runs on any thread."""
    return [
        {
            **head,
            "token_ids": prompt.token_ids,
            "prompt": _text(prompt, codec),
            "max_tokens": request.max_tokens,
        }
        for prompt, request in zip(job.prompts, job.requests, strict=True)
    ]


def _text(prompt: EncodedPrompt, codec: TextCodec) -> str:
    """As the tokenizer was given it; of ids and segments, what they say."""
    if prompt.text is not None:
        return prompt.text
    return codec.decode(prompt.token_ids, skip_special_tokens=False)
