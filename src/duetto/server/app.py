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
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import GrammarMaker
from duetto.core.text import TextCodec, bytes_in_place
from duetto.engine.thread import SteppedEngine
from duetto.server.apis.asked import AskedChat, AskedPrompts
from duetto.server.apis.chat import read_chat
from duetto.server.apis.chunks import ChunkTranslator
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
from duetto.server.apis.sampling import check_lists, check_step_entries, completion_asked
from duetto.server.apis.shapes import ChatShape, CompletionShape, ReplyShape
from duetto.server.apis.translator import Translator
from duetto.server.cache_api import CacheApi
from duetto.server.door import Door, Job, RequestHead
from duetto.server.exchange import CLIENT_GONE, EventStream, Exchange
from duetto.server.http.body import body_of
from duetto.server.http.byte_budget import ByteBudget, Held
from duetto.server.http.errors import (
    ApiError,
    error_response,
    invalid,
    json_response,
    refused,
    unknown_model,
)
from duetto.server.http.json_parts import Json, PartsResponse, json_parts, packed
from duetto.server.http.middleware import HostGuard, KeyGuard, RequestFrame
from duetto.server.http.origins import OriginGuard, Origins
from duetto.server.http.paths import on_http_exception
from duetto.server.http.places import client_of
from duetto.server.http.presence import while_connected
from duetto.server.http.text_work import TextWork
from duetto.server.observe.journal import Journal
from duetto.server.observe.metrics import Metrics
from duetto.server.observe.questions import Questions
from duetto.server.observe.timeline import RoofTime
from duetto.server.relay import Relay
from duetto.server.settings import ServerSettings

logger = logging.getLogger(__name__)

LITTLE_REPLY_BYTES = 2**20
TOKEN_BYTES = 16  # roughly a token's id and text in a reply of /tokenize


def create_app(
    *,
    engine: SteppedEngine,
    codec: TextCodec,
    config: SchedulerConfig,
    settings: ServerSettings,
    roof_time: RoofTime | None = None,
    grammars: GrammarMaker | None = None,
) -> Starlette:
    """An ASGI application that serves one model; the engine's thread lives as long as it does.

    The engine must use `time.monotonic` as its clock. `app.state.relay` shows what is
    running, `app.state.replies` how many bytes replies could take.
    `roof_time` is what a step would take if it reached the roof of this machine; `grammars` makes
    those of structured outputs.
    """
    metrics = Metrics(settings, config)
    relay = Relay(engine, config, settings, metrics)
    work = TextWork(settings.max_held_bytes)
    api = Api(codec, config, settings, relay, metrics, work, grammars)
    cache = CacheApi(codec, config, settings, relay, metrics, work)
    questions = Questions(relay, settings, roof_time)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        relay.start()
        try:
            yield
        finally:
            await relay.stop()
            work.stop()

    routes = [*api.routes(), *cache.routes(), *questions.routes()]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=_middleware(
            settings, metrics, relay.journal, frozenset(route.path for route in routes)
        ),
        exception_handlers={
            ApiError: _on_api_error,
            InvalidRequest: _on_invalid_request,
            HTTPException: on_http_exception,
            ClientDisconnect: _on_disconnect,
        },
    )
    app.router.redirect_slashes = False  # an unknown path is an error, not a guess
    app.state.relay = relay
    app.state.replies = api.replies
    return app


def _middleware(
    settings: ServerSettings, metrics: Metrics, journal: Journal, handlers: frozenset[str]
) -> list[Middleware]:
    """Outermost first. A browser's preflight carries no key, so it is answered before the guard."""
    origins = Origins(settings.allowed_origins)
    frame = Middleware(RequestFrame, metrics, journal, handlers)
    guards = [Middleware(HostGuard)] if settings.only_local_hosts else []
    if settings.api_keys:
        guards.append(Middleware(KeyGuard, settings.api_keys))
    else:
        guards.append(Middleware(OriginGuard, origins))
    return [frame, origins.cors(), *guards]


class Api:
    """The handlers, one method each."""

    def __init__(
        self,
        codec: TextCodec,
        config: SchedulerConfig,
        settings: ServerSettings,
        relay: Relay,
        metrics: Metrics,
        work: TextWork,
        grammars: GrammarMaker | None,
    ) -> None:
        self._codec = codec
        self._config = config
        self._settings = settings
        self._relay = relay
        self._metrics = metrics
        self._work = work
        self.replies = ByteBudget(
            settings.max_replies_bytes, LITTLE_REPLY_BYTES, "large replies are being made and read"
        )
        self._door = Door(codec, config, settings, work, relay.clock, grammars)
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
        async with body_of(request, self._settings, self._work) as body:
            wire, asked = await self._work.read(lambda: self._read_completion(body), len(body))
            num_answers = self._checked_fan(len(asked.prompts), asked.asked.sampling)
            with self._relay.reserved(num_answers, client_of(request.scope)):
                arrival = self._arrival(request, len(body))
                job = await while_connected(request, self._door.completion(asked, arrival))
                held = self.replies.hold(job.reply_bytes)
                shape = CompletionShape(wire, job, self._codec)
                translator = self._translator(wire, job, shape, arrival)
                scores_only = wire.max_tokens == 0
                exchange = self._submit(job, translator, arrival, only_prompt=scores_only)
        return await self._reply(wire.stream, exchange, held, request)

    async def chat_completions(self, request: Request) -> Response:
        async with body_of(request, self._settings, self._work) as body:
            wire, conversation = await self._work.read(lambda: self._read_chat(body), len(body))
            num_answers = self._checked_fan(1, conversation.asked.sampling)
            with self._relay.reserved(num_answers, client_of(request.scope)):
                arrival = self._arrival(request, len(body))
                job = await while_connected(request, self._door.chat(conversation, arrival))
                held = self.replies.hold(job.reply_bytes)
                shape = ChatShape(wire, job, self._codec)
                exchange = self._submit(job, self._translator(wire, job, shape, arrival), arrival)
        return await self._reply(wire.stream, exchange, held, request)

    async def tokenize(self, request: Request) -> Response:
        async with body_of(request, self._settings, self._work) as body:
            with self._relay.reserved(1, client_of(request.scope)):
                wire = await self._work.read(lambda: decode(body, TokenizeRequest), len(body))
                self._check_model(wire.model)
                door = self._door.tokenize(wire, len(body))
                tokens = [*(await while_connected(request, door)).token_ids]

        def reply() -> list[bytes]:
            fields: Json = {
                "count": len(tokens),
                "max_model_len": self._config.max_model_len,
                "tokens": tokens,
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
                self._check_model(wire.model)
                door = self._door.detokenize(wire.tokens, len(body))
                text = await while_connected(request, door)
        parts = await self._work.reply(lambda: packed(json_parts({"prompt": text})), len(text))
        return PartsResponse(parts)

    async def models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["id"])
        return json_response(self._model_card())

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

    def _read_completion(self, body: bytes) -> tuple[CompletionRequest, AskedPrompts]:
        """Runs on any thread."""
        wire = decode(body, CompletionRequest)
        self._check_model(wire.model)
        check_lists(wire, self._codec.vocab_size)
        asked = completion_asked(wire, self._settings.default_sampling)
        prompts = AskedPrompts(
            asked=asked,
            prompts=split_prompts(wire.prompt, self._config, self._settings.max_answers),
            add_special_tokens=wire.add_special_tokens is not False,
            echo=bool(wire.echo),
            echo_tokens=wire.logprobs is not None,
        )
        return wire, prompts

    def _read_chat(self, body: bytes) -> tuple[ChatRequest, AskedChat]:
        """Runs on any thread."""
        wire = decode(body, ChatRequest)
        self._check_model(wire.model)
        check_lists(wire, self._codec.vocab_size)
        return wire, read_chat(wire, self._settings.default_sampling)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.served_model_name:
            raise unknown_model(name, self._settings.served_model_name)

    def _checked_fan(self, num_prompts: int, sampling: SamplingParams) -> int:
        """How many requests of the engine this is; refused if they could never be held at once."""
        asked, field = num_prompts * sampling.n, "n" if sampling.n > 1 else "prompt"
        what = f"{num_prompts} prompts with n={sampling.n} ask for {asked} answers"
        if asked > self._settings.max_answers:
            raise invalid(field, f"{what}; at most {self._settings.max_answers} per request")
        running, queued = self._config.max_num_seqs, self._settings.max_num_queued_reqs
        if asked > running + queued:
            raise invalid(
                field,
                f"{what}; this server holds at most {running + queued}: {running} that run and "
                f"{queued} that wait (--max-num-seqs, --max-num-queued-reqs)",
            )
        check_step_entries(sampling, min(asked, running))
        return asked

    def _arrival(self, request: Request, num_bytes: int) -> RequestHead:
        state = request.scope["state"]
        tenant = state.get("tenant", b"")
        own = state["request_id"]
        name = self._relay.history.claim(tenant, state["request_label"], own)
        return RequestHead(own, num_bytes, tenant, name, client_of(request.scope))

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

    def _submit(
        self, job: Job, translator: Translator, arrival: RequestHead, *, only_prompt: bool = False
    ) -> Exchange:
        return Exchange(
            job,
            self._relay.submit(job.requests, arrival.name),
            translator,
            clock=self._relay.clock,
            only_prompt=only_prompt,
            tells_other_salts=self._settings.only_local_hosts,
        )

    async def _reply(
        self, streams: bool | None, exchange: Exchange, held: Held, request: Request
    ) -> Response:
        if streams:
            return EventStream(exchange, self._relay, self._settings.sse_keep_alive_s)
        return await exchange.reply(self._relay, request.receive, self._work, held.release)

    def _model_card(self) -> Json:
        name = self._settings.served_model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "duetto",
            "root": name,  # not the directory: paths of this machine are nobody's business
            "parent": None,
            "max_model_len": self._config.max_model_len,
            "dtype": self._settings.dtype,
            "quantization": self._settings.quantization,
            "kv_cache_dtype": self._settings.kv_cache_dtype,
            "backend": self._settings.backend,
            "permission": [],
        }


async def _on_api_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error_response(error)


async def _on_invalid_request(_: Request, error: Exception) -> Response:
    """What a codec refuses: a template that raises, a text that has no ids."""
    if not isinstance(error, InvalidRequest):
        raise error
    return error_response(refused(error, {}))


async def _on_disconnect(_: Request, error: Exception) -> Response:
    logger.info("a client left while it sent its request: %s", type(error).__name__)
    return Response(status_code=CLIENT_GONE)
