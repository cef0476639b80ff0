"""The routes of Anthropic's Messages. Knows no engine and no tokens."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.server.answering import Answering
from duetto.server.apis.anthropic.body import CountRequest, MessagesRequest
from duetto.server.apis.anthropic.conversation import chat_prompt_of, read_messages
from duetto.server.apis.anthropic.events import MessagesTranslator
from duetto.server.apis.asked import AskedChat
from duetto.server.apis.reading import decode
from duetto.server.apis.said import AnswerReader
from duetto.server.apis.translator import Translator
from duetto.server.door import Job, RequestHead
from duetto.server.http.body import body_of
from duetto.server.http.errors import json_response
from duetto.server.http.places import client_of
from duetto.server.http.presence import while_connected


class MessagesApi:
    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def routes(self) -> list[Route]:
        post = partial(Route, methods=["POST"])
        return [
            post("/v1/messages", self.messages),
            post("/v1/messages/count_tokens", self.count_tokens),
        ]

    async def messages(self, request: Request) -> Response:
        return await self._answering.answer(request, self._read, self._translator)

    async def count_tokens(self, request: Request) -> Response:
        answering = self._answering
        async with body_of(request, answering.settings, answering.work) as body:
            with answering.relay.reserved(1, client_of(request.scope)):
                prompt, names = await answering.work.read(lambda: self._read_count(body), len(body))
                counted = answering.door.tokenize_chat(prompt, len(body), names)
                counted_ids = await while_connected(request, counted)
        return json_response({"input_tokens": len(counted_ids.token_ids)})

    def _read(self, body: bytes) -> AskedChat:
        """Runs on any thread."""
        wire = decode(body, MessagesRequest)
        self._answering.check_model(wire.model)
        return read_messages(wire, self._answering.settings.default_sampling)

    def _read_count(self, body: bytes):  # type: ignore[no-untyped-def]
        wire = decode(body, CountRequest)
        self._answering.check_model(wire.model)
        return chat_prompt_of(wire)

    def _translator(self, asked: AskedChat, job: Job, arrival: RequestHead) -> Translator:
        reader = AnswerReader(job.make_parser)
        model = self._answering.settings.served_model_name
        thinking = asked.body.thinking
        shows = thinking is None or thinking.display != "omitted"
        return MessagesTranslator("msg_" + arrival.name, model, reader, shows_thinking=shows)
