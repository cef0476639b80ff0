"""The routes by which users look into the KV cache, keep what they need of it, and drop the rest.

Every tenant means its own KV only: its key is part of each hash, and of each pin. Knows no blocks.
"""

from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.core.cache_control import (
    MAX_PAGE,
    CachedText,
    CacheMessage,
    CacheReply,
    Drop,
    Dropped,
    Found,
    ListPins,
    LookUp,
    Pin,
    Pinned,
    PinNotFound,
    PinPage,
    PinQuotaExceeded,
    Unpin,
)
from duetto.core.errors import InvalidRequest
from duetto.engine.intake import MeantText, meant_text
from duetto.engine.segments import PromptSegment, SegmentedIds, encode_segments
from duetto.server.answering import Answering
from duetto.server.apis.cache import (
    CacheTextRequest,
    PinOrTextRequest,
    PinRequest,
    dropped_reply,
    found_reply,
    named_text,
    page_reply,
    pin_number,
    pin_reply,
    segment_of,
    segments_sent,
    token_ids_of,
    tokenize_request,
    unpinned_reply,
)
from duetto.server.apis.reading import decode
from duetto.server.door import checked_salt
from duetto.server.http.body import body_of
from duetto.server.http.errors import ApiError, invalid, json_response, refused
from duetto.server.http.places import client_of
from duetto.server.http.presence import while_connected
from duetto.server.http.query import number_of, query_of
from duetto.server.observe.metrics import Metrics

W = TypeVar("W", bound=CacheTextRequest)
DEFAULT_PAGE = 20


class CacheApi:
    """The handlers, one method each."""

    def __init__(self, answering: Answering, metrics: Metrics) -> None:
        self._answering = answering
        self._codec = answering.codec
        self._config = answering.config
        self._settings = answering.settings
        self._relay = answering.relay
        self._metrics = metrics
        self._work = answering.work
        self._door = answering.door

    def routes(self) -> list[Route]:
        post = partial(Route, methods=["POST"])
        return [
            Route("/v1/cache", self.pins),
            post("/v1/cache/lookup", self.look_up),
            post("/v1/cache/pin", self.pin),
            post("/v1/cache/unpin", self.unpin),
            post("/v1/cache/drop", self.drop),
        ]

    async def look_up(self, request: Request) -> Response:
        _, meant = await self._read(request, CacheTextRequest)
        assert isinstance(meant, MeantText)
        found = await self._ask(LookUp(meant.text, meant.segments))
        assert isinstance(found, Found)
        return json_response(found_reply(found, meant.places))

    async def pin(self, request: Request) -> Response:
        wire, meant = await self._read(request, PinRequest)
        assert isinstance(meant, MeantText)
        made = await self._ask(Pin(_tenant(request), meant.text, wire.ttl_s, wire.priority), wire)
        assert isinstance(made, Pinned)
        return json_response(pin_reply(made))

    async def unpin(self, request: Request) -> Response:
        wire, meant = await self._read(request, PinOrTextRequest)
        ended = await self._ask(Unpin(_tenant(request), _pin_of(meant)), wire)
        assert isinstance(ended, Pinned)
        return json_response(unpinned_reply(ended))

    async def drop(self, request: Request) -> Response:
        wire, meant = await self._read(request, PinOrTextRequest)
        dropped = await self._ask(Drop(_tenant(request), _pin_of(meant)), wire)
        assert isinstance(dropped, Dropped)
        return json_response(dropped_reply(dropped))

    async def pins(self, request: Request) -> Response:
        """One's own pins, oldest first, a page at a time."""
        query = query_of(request, ("after", "limit"))
        after, limit = query.get("after"), number_of(query, "limit", DEFAULT_PAGE, MAX_PAGE)
        if after is not None and not (number := pin_number(after)):
            raise invalid("after", "must be a pin's id, like pin-1")
        message = ListPins(_tenant(request), 0 if after is None else number, limit)
        with self._relay.reserved(1, client_of(request.scope)):
            page = await self._ask(message)
        assert isinstance(page, PinPage)
        return json_response(page_reply(page, self._config.block_size))

    # --- steps of a request ----------------------------------------------------------------------

    async def _read(self, request: Request, into: type[W]) -> tuple[W, MeantText | int]:
        """A body, and the pin that it means: by its number, or by its text."""
        async with body_of(request, self._settings, self._work) as body:
            with self._relay.reserved(1, client_of(request.scope)):
                wire = await self._work.read(lambda: decode(body, into), len(body))
                self._answering.check_model(wire.model)
                field = named_text(wire)
                if field is None:
                    assert isinstance(wire, PinOrTextRequest) and wire.id is not None
                    return wire, pin_number(wire.id)
                text = self._text(wire, field, _tenant(request), len(body))
                return wire, await while_connected(request, text)

    async def _text(
        self, wire: CacheTextRequest, field: str, tenant: bytes, num_bytes: int
    ) -> MeantText:
        """The text as a request would be tokenized and hashed."""
        salt = tenant + checked_salt(wire.cache_salt)
        try:
            ids = await self._ids(wire, num_bytes)
            return await self._work.text(
                lambda: meant_text(
                    ids,
                    codec=self._codec,
                    config=self._config,
                    cache_salt=salt,
                    is_segment=field == "segment",
                ),
                num_bytes,
            )
        except InvalidRequest as error:
            raise refused(error, {"prompt": field}) from None

    async def _ids(self, wire: CacheTextRequest, num_bytes: int) -> SegmentedIds:
        sent = token_ids_of(wire)
        if sent is not None:
            return SegmentedIds(tuple(sent), ())
        segments, add_special = segments_sent(wire), wire.add_special_tokens is not False
        if (segment := segment_of(wire)) is not None:
            segments, add_special = (PromptSegment(segment),), False
        if not segments:
            return await self._door.tokenize(tokenize_request(wire), num_bytes)
        encode = partial(encode_segments, self._codec, segments, add_special_tokens=add_special)
        return await self._work.text(encode, num_bytes)

    async def _ask(self, message: CacheMessage, wire: CacheTextRequest | None = None) -> CacheReply:
        """What the engine answers, or a refusal in the caller's words."""
        field = (None if wire is None else named_text(wire)) or "id"
        try:
            reply = await self._relay.control(message)
        except PinNotFound as error:
            words = f"{error.message}; GET /v1/cache lists them"
            raise ApiError(404, words, param=field, code="pin_not_found") from None
        except PinQuotaExceeded as error:
            words = f"{field}: {error.message}; unpin something (GET /v1/cache lists what is there)"
            raise ApiError(400, words, param=field, code="pin_quota_exceeded") from None
        except InvalidRequest as error:
            raise refused(error, {"prompt": field}) from None
        if isinstance(reply, Pinned | Dropped):
            self._metrics.cache.record(reply.counts)
        return reply


def _pin_of(meant: MeantText | int) -> CachedText | int:
    return meant.text if isinstance(meant, MeantText) else meant


def _tenant(request: Request) -> bytes:
    tenant: bytes = request.scope["state"].get("tenant", b"")
    return tenant
