"""The HTTP API: routes, and the way of one request through door, relay and exchange.

Joins the server's parts and is handed the engine, the codec and the configuration. Knows no model.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.structured import GrammarMaker
from duetto.core.text import TextCodec, bytes_in_place
from duetto.engine.handle import EngineOpener
from duetto.engine.speech import Speech
from duetto.server.answering import Answering
from duetto.server.apis.asked import AskedChat, AskedPrompts
from duetto.server.apis.chat import read_chat
from duetto.server.apis.chunks import ChunkTranslator
from duetto.server.apis.error_shapes import reply_in_shape
from duetto.server.apis.prompts import split_prompts
from duetto.server.apis.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingRequest,
    StreamOptions,
    TokenizeRequest,
)
from duetto.server.apis.reading import decode
from duetto.server.apis.replies import Envelope
from duetto.server.apis.sampling import check_lists, completion_asked, middle_of
from duetto.server.apis.shapes import ChatShape, CompletionShape, ReplyShape
from duetto.server.apis.translator import Translator
from duetto.server.cache_api import CacheApi
from duetto.server.door import Job, RequestHead
from duetto.server.embeddings_api import EmbeddingsApi
from duetto.server.exchange import CLIENT_GONE
from duetto.server.http.body import body_of
from duetto.server.http.errors import (
    ApiError,
    json_response,
    refused,
)
from duetto.server.http.json_parts import Json, PartsResponse, json_parts, packed
from duetto.server.http.middleware import HostGuard, KeyGuard, RequestFrame
from duetto.server.http.origins import OriginGuard, Origins
from duetto.server.http.paths import refused_by_routing
from duetto.server.http.places import client_of
from duetto.server.http.presence import while_connected
from duetto.server.http.text_work import TextWork
from duetto.server.infill_api import InfillApi
from duetto.server.messages_api import MessagesApi
from duetto.server.observe.journal import Journal
from duetto.server.observe.metrics import Metrics
from duetto.server.observe.questions import Questions
from duetto.server.observe.status import ServerStatus
from duetto.server.observe.timeline import RoofTime
from duetto.server.relay import Relay
from duetto.server.render_api import RenderApi
from duetto.server.responses_api import ResponsesApi
from duetto.server.settings import ServerSettings

logger = logging.getLogger(__name__)

TOKEN_BYTES = 16  # roughly a token's id and text in a reply of /tokenize


def create_app(
    *,
    open_engine: EngineOpener,
    codec: TextCodec,
    config: SchedulerConfig,
    settings: ServerSettings,
    roof_time: RoofTime | None = None,
    grammars: GrammarMaker | None = None,
    speech: Speech = Speech(),  # noqa: B008  # frozen
) -> Starlette:
    """An ASGI application that serves one model; the engine's thread lives as long as it does.

    The engine must use `time.monotonic` as its clock. `app.state.relay` shows what is
    running, `app.state.replies` how many bytes replies could take.
    `speech` tells what the model's answers mean; `roof_time` what a step would take if it reached
    the roof of this machine; `grammars` makes those of structured outputs.
    """
    metrics = Metrics(settings, config)
    relay = Relay(open_engine, config, settings, metrics)
    work = TextWork(settings.max_held_bytes)
    answering = Answering(codec, config, settings, relay, work, grammars, speech)
    api = Api(answering, metrics)
    render = RenderApi(answering, api.read_completion, api.read_chat)
    apis = (
        *(api, render, MessagesApi(answering), ResponsesApi(answering)),
        *(EmbeddingsApi(answering), InfillApi(answering)),
    )
    cache = CacheApi(answering, metrics)
    questions = Questions(relay, settings, roof_time)
    status = ServerStatus(relay, codec, config, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        relay.start()
        try:
            yield
        finally:
            await relay.stop()
            work.stop()

    routes = [
        *(route for api in apis for route in api.routes()),
        *cache.routes(),
        *questions.routes(),
        *status.routes(),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=_middleware(
            settings, metrics, relay.journal, frozenset(route.path for route in routes)
        ),
        exception_handlers={
            ApiError: _on_api_error,
            InvalidRequest: _on_invalid_request,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
        },
    )
    app.router.redirect_slashes = False  # an unknown path is an error, not a guess
    app.state.relay = relay
    app.state.replies = answering.replies
    return app


def _middleware(
    settings: ServerSettings, metrics: Metrics, journal: Journal, handlers: frozenset[str]
) -> list[Middleware]:
    """Outermost first. A browser's preflight carries no key, so it is answered before the guard."""
    origins = Origins(settings.allowed_origins)
    frame = Middleware(RequestFrame, metrics, journal, handlers)
    guards = [Middleware(HostGuard)] if settings.only_local_hosts else []
    if settings.api_keys:
        guards.append(Middleware(KeyGuard, settings.api_keys, reply_in_shape))
    else:
        guards.append(Middleware(OriginGuard, origins))
    return [frame, origins.cors(), *guards]


class Api:
    """The handlers, one method each."""

    def __init__(self, answering: Answering, metrics: Metrics) -> None:
        self._answering = answering
        self._codec = answering.codec
        self._config = answering.config
        self._settings = answering.settings
        self._relay = answering.relay
        self._work = answering.work
        self._metrics = metrics
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        post = partial(Route, methods=["POST"])
        return [
            post("/v1/completions", self.completions),
            post("/v1/chat/completions", self.chat_completions),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            post("/tokenize", self.tokenize),
            post("/detokenize", self.detokenize),
            Route("/health", self.health),
            Route("/ping", self.health, methods=["GET", "POST"]),
            Route("/version", self.version),
            Route("/metrics", self.metrics),
        ]

    async def completions(self, request: Request) -> Response:
        return await self._answering.answer(
            request,
            self.read_completion,
            self._completion_chunks,
            only_prompt=lambda asked: asked.body.max_tokens == 0,
        )

    async def chat_completions(self, request: Request) -> Response:
        return await self._answering.answer(request, self.read_chat, self._chat_chunks)

    async def tokenize(self, request: Request) -> Response:
        async with body_of(request, self._settings, self._work) as body:
            with self._relay.reserved(1, client_of(request.scope)):
                wire = await self._work.read(lambda: decode(body, TokenizeRequest), len(body))
                self._answering.check_model(wire.model)
                door = self._answering.door.tokenize(wire, len(body))
                tokens = [*(await while_connected(request, door)).token_ids]

        def reply() -> list[bytes]:
            fields: Json = {
                "count": len(tokens),
                "max_model_len": self._config.max_model_len,
                "tokens": tokens,
                "token_strs": None,
            }
            if wire.return_token_strs:
                shown = bytes_in_place(self._codec, tokens)
                fields["token_strs"] = [data.decode(errors="replace") for data in shown]
            return packed(json_parts(fields))

        return PartsResponse(await self._work.reply(reply, TOKEN_BYTES * len(tokens)))

    async def detokenize(self, request: Request) -> Response:
        async with body_of(request, self._settings, self._work) as body:
            with self._relay.reserved(1, client_of(request.scope)):
                wire = await self._work.read(lambda: decode(body, DetokenizeRequest), len(body))
                self._answering.check_model(wire.model)
                door = self._answering.door.detokenize(wire.tokens, len(body))
                text = await while_connected(request, door)
        parts = await self._work.reply(lambda: packed(json_parts({"prompt": text})), len(text))
        return PartsResponse(parts)

    async def models(self, _: Request) -> Response:
        names = self._settings.model_names
        return json_response({"object": "list", "data": [self._model_card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        self._answering.check_model(name)
        known = name in self._settings.model_names
        return json_response(self._model_card(name if known else self._settings.served_model_name))

    async def health(self, _: Request) -> Response:
        self._relay.check_health()
        return Response(status_code=200)

    async def version(self, _: Request) -> Response:
        return json_response({"version": self._settings.version})

    async def metrics(self, _: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        # Some milliseconds, in which a thread leaves the interpreter to others now and then.
        text = await asyncio.to_thread(self._metrics.exposition)
        return Response(text, headers={"Content-Type": kind})

    # --- steps of a request ----------------------------------------------------------------------

    def read_completion(self, body: bytes) -> AskedPrompts:
        """Runs on any thread."""
        wire = decode(body, CompletionRequest)
        self._answering.check_model(wire.model)
        check_lists(wire, self._codec.vocab_size)
        return AskedPrompts(
            asked=completion_asked(wire, self._settings.default_sampling),
            prompts=split_prompts(
                wire.prompt,
                self._config,
                self._settings.max_answers,
                is_truncated=wire.truncate_prompt_tokens is not None,
            ),
            body=wire,
            add_special_tokens=wire.add_special_tokens is not False,
            middle=middle_of(wire),
            echo=bool(wire.echo),
            echo_tokens=wire.logprobs is not None,
        )

    def read_chat(self, body: bytes) -> AskedChat:
        """Runs on any thread."""
        wire = decode(body, ChatRequest)
        self._answering.check_model(wire.model)
        check_lists(wire, self._codec.vocab_size)
        return read_chat(wire, self._settings.default_sampling)

    def _completion_chunks(self, asked: AskedPrompts, job: Job, arrival: RequestHead) -> Translator:
        shape = CompletionShape(asked.body, job, self._codec)
        return self._translator(asked.body, job, shape, arrival)

    def _chat_chunks(self, asked: AskedChat, job: Job, arrival: RequestHead) -> Translator:
        return self._translator(asked.body, job, ChatShape(asked.body, job, self._codec), arrival)

    def _translator(
        self, wire: SamplingRequest, job: Job, shape: ReplyShape, arrival: RequestHead
    ) -> Translator:
        streams = bool(wire.stream)
        envelope = Envelope(
            id=shape.id_prefix + arrival.name,
            object=shape.chunk_object if streams else shape.reply_object,
            created=int(time.time()),
            model=self._settings.served_model_name,
            system_fingerprint=self._settings.system_fingerprint,
        )
        return ChunkTranslator(
            shape,
            envelope,
            wire.stream_options or StreamOptions(),
            num_choices=len(job.requests),
            num_per_prompt=job.sampling.n,
            return_token_ids=bool(wire.return_token_ids),
        )

    def _model_card(self, name: str) -> Json:
        root = self._settings.served_model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "duetto",
            "root": root,  # not the directory: paths of this machine are nobody's business
            "parent": None,
            "max_model_len": self._config.max_model_len,
            "dtype": self._settings.dtype,
            "quantization": self._settings.quantization,
            "kv_cache_dtype": self._settings.kv_cache_dtype,
            "backend": self._settings.backend,
            "permission": [],
        }


async def _on_api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return reply_in_shape(request.scope["path"], error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return reply_in_shape(request.scope["path"], refused_by_routing(request, error))


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    """What a codec refuses: a template that raises, a text that has no ids."""
    if not isinstance(error, InvalidRequest):
        raise error
    return reply_in_shape(request.scope["path"], refused(error, {}))


async def _on_disconnect(_: Request, error: Exception) -> Response:
    logger.info("a client left while it sent its request: %s", type(error).__name__)
    return Response(status_code=CLIENT_GONE)
