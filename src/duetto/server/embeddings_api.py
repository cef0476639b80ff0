"""The route of embeddings: a body's texts to requests of the engine, and what comes of them.

A body may have more texts than may wait. All are judged before the engine hears of one; then they
go to it a window at a time, so that they fill no queue. Knows no model.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.engine.embedding_intake import make_embedding_request
from duetto.server.answer import ClientGone
from duetto.server.answering import Answering
from duetto.server.apis.embeddings import (
    AskedEmbeddings,
    EmbeddingInput,
    EmbeddingRequest,
    embeddings_body,
    read_embeddings,
    reply_bytes,
)
from duetto.server.apis.reading import decode
from duetto.server.door import RequestHead, checked_salt
from duetto.server.exchange import CLIENT_GONE, check_ended, watched
from duetto.server.http.body import body_of
from duetto.server.http.errors import invalid, refused, stopping
from duetto.server.http.json_parts import PartsResponse, json_parts, packed
from duetto.server.http.places import client_of
from duetto.server.http.presence import while_connected


@dataclass(slots=True)
class _Embedded:
    """What has come so far, in the order of the inputs."""

    embeddings: list[bytes] = field(default_factory=list)
    num_cached: int = 0


class EmbeddingsApi:
    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._settings = answering.settings
        self._config = answering.config
        self._codec = answering.codec
        self._relay = answering.relay

    def routes(self) -> list[Route]:
        return [Route("/v1/embeddings", self.embeddings, methods=["POST"])]

    async def embeddings(self, request: HttpRequest) -> Response:
        work, client = self._answering.work, client_of(request.scope)
        async with body_of(request, self._settings, work) as body:
            asked = await work.read(lambda: self._read(body), len(body))
            window = min(len(asked.inputs), self._max_window)
            with self._relay.reserved(window, client):
                arrival = self._answering.arrival(request, len(body), claims_name=True)
                made = work.text(lambda: self._draft(asked, arrival), len(body))
                requests = await while_connected(request, made)
        num_bytes = reply_bytes(len(requests), self._num_numbers(asked), asked.encoding)
        held = self._answering.replies.hold(num_bytes)
        try:
            embedded = await self._embed(requests, arrival, request, window)
            parts = await work.reply(
                lambda: self._parts(asked, requests, embedded, arrival), num_bytes
            )
        except ClientGone:
            held.release()
            return Response(status_code=CLIENT_GONE)
        except BaseException:
            held.release()
            raise
        return PartsResponse(parts, held.release)

    @property
    def _max_window(self) -> int:
        """Inputs of one body that run or wait at a time."""
        return self._config.max_num_seqs + self._settings.max_num_queued_reqs // 4

    async def _embed(
        self, requests: Sequence[Request], arrival: RequestHead, http: HttpRequest, window: int
    ) -> _Embedded:
        """Raises ApiError if the engine could not, ClientGone if nobody waits for it."""
        embedded = _Embedded()
        for start in range(0, len(requests), window):
            if self._relay.is_stopping:
                raise stopping()
            now = self._relay.clock()
            each = [replace(r, arrival_time=now) for r in requests[start : start + window]]
            answer = self._relay.submit(tuple(each), arrival.name)
            found: dict[int, bytes] = {}
            async with watched(answer, self._relay, http.receive):
                while not answer.has_ended:
                    for delta in await answer.next(None):
                        check_ended(delta)
                        if delta.final is not None:
                            found[delta.index] = delta.final.embedding
                            embedded.num_cached += delta.final.num_cached_tokens
            embedded.embeddings += [found[index] for index in range(len(each))]
        return embedded

    def _num_numbers(self, asked: AskedEmbeddings) -> int:
        model = self._settings.embeddings
        return asked.params.dimensions or (0 if model is None else model.size)

    # --- these run on any thread ---------------------------------------------------------------

    def _read(self, body: bytes) -> AskedEmbeddings:
        """What is refused here was not tokenized."""
        wire = decode(body, EmbeddingRequest)
        self._answering.check_model(wire.model)
        asked, model = read_embeddings(wire), self._settings.embeddings
        if model is None:
            return asked  # the first request that is made of it says what to do
        try:
            self._config.check_priority(asked.priority)
            model.check(asked.params)
            model.prompt(asked.prompt_name)
        except InvalidRequest as error:
            raise refused(error, {}) from None
        size, most = self._num_numbers(asked), self._settings.max_reply_bytes
        num_bytes = reply_bytes(len(asked.inputs), size, asked.encoding)
        if num_bytes > most:
            raise invalid(
                "input",
                f"the reply could take {num_bytes} bytes, for {len(asked.inputs)} embeddings of "
                f"{size} numbers; at most {most} are accepted. Send fewer, or ask for base64",
            )
        return asked

    def _draft(self, asked: AskedEmbeddings, arrival: RequestHead) -> list[Request]:
        """Raises ApiError 400, naming the input at fault."""
        salt = arrival.tenant + checked_salt(asked.cache_salt)
        model, made = self._settings.embeddings, []
        for index, given in enumerate(asked.inputs):
            try:
                request = make_embedding_request(
                    self._ids(asked, given),
                    asked.params,
                    model=model,
                    codec=self._codec,
                    config=self._config,
                    request_id=f"{arrival.request_id}-{index}",
                    arrival_time=0.0,
                    priority=asked.priority,
                    cache_salt=salt,
                    tenant=arrival.client,
                )
            except InvalidRequest as error:
                raise refused(error, asked.names(index)) from None
            made.append(request)
        return made

    def _ids(self, asked: AskedEmbeddings, given: EmbeddingInput) -> Sequence[int]:
        """Raises InvalidRequest, for what is too long before it is tokenized where that shows."""
        model, longest = self._settings.embeddings, self._config.longest_embedded
        kept = longest if asked.truncate_prompt_tokens == -1 else asked.truncate_prompt_tokens
        if model is not None and isinstance(given, str):
            given = model.prompt(asked.prompt_name) + given
        if isinstance(given, str):
            bytes_each = self._codec.max_token_bytes
            least = -(-len(given.encode(errors="ignore")) // bytes_each) if bytes_each else 0
            if kept is None and least > longest:
                raise self._config.too_long_to_embed(least, is_lower_bound=True)
            given = self._codec.encode(given, add_special_tokens=asked.add_special_tokens)
        return given if kept is None else given[-kept:]

    def _parts(
        self,
        asked: AskedEmbeddings,
        requests: Sequence[Request],
        embedded: _Embedded,
        arrival: RequestHead,
    ) -> list[bytes]:
        body = embeddings_body(
            arrival.name,
            int(time.time()),
            self._settings.served_model_name,
            embedded.embeddings,
            asked.encoding,
            num_prompt=sum([request.num_prompt_tokens for request in requests]),
            num_cached=embedded.num_cached,
        )
        return packed(json_parts(body))
