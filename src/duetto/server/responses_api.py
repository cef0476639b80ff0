"""The routes of OpenAI's Responses, and what is stored for them. Knows no engine and no tokens."""

import time
from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.server.answering import Answering
from duetto.server.apis.asked import AskedChat
from duetto.server.apis.reading import decode
from duetto.server.apis.responses.body import ResponsesRequest
from duetto.server.apis.responses.conversation import read_response
from duetto.server.apis.responses.events import ResponsesTranslator
from duetto.server.apis.responses.output import input_items, messages_of_output, page_of
from duetto.server.apis.responses.store import ResponseStore, Stored
from duetto.server.apis.said import AnswerReader
from duetto.server.apis.translator import Translator
from duetto.server.door import Job, RequestHead
from duetto.server.http.errors import ApiError, cut, invalid, json_response
from duetto.server.http.json_parts import Json
from duetto.server.http.query import number_of, query_of

ID_PREFIX = "resp_"
DEFAULT_PAGE, MAX_PAGE = 20, 100  # input items, as OpenAI has it


class ResponsesApi:
    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        settings = answering.settings
        self._stores = settings.max_stored_bytes > 0
        self._store = ResponseStore(
            settings.max_stored_bytes, settings.stored_ttl_s, answering.relay.clock
        )

    def routes(self) -> list[Route]:
        post = partial(Route, methods=["POST"])
        one = "/v1/responses/{id}"
        return [
            post("/v1/responses", self.create),
            Route(one, self.retrieve),
            Route(one, self.delete, methods=["DELETE"]),
            post(one + "/cancel", self.cancel),
            Route(one + "/input_items", self.input_items),
        ]

    async def create(self, request: Request) -> Response:
        tenant = _tenant(request)
        read = partial(self._read, tenant)
        return await self._answering.answer(request, read, self._translator)

    async def retrieve(self, request: Request) -> Response:
        query = query_of(request, ("stream", "include_obfuscation"))
        if query.get("stream", "false") != "false":
            raise invalid("stream", "a stored response cannot be streamed; accepted: false")
        return json_response(self._stored(request).body)

    async def delete(self, request: Request) -> Response:
        query_of(request)
        response_id = self._stored(request).body["id"]
        self._store.delete(_tenant(request), response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Only what runs in the background can be cancelled, and nothing does: a response ends when
        its client hangs up."""
        query_of(request)
        self._stored(request)
        raise invalid(
            "id", "has ended; a response that is being made ends when its client hangs up"
        )

    async def input_items(self, request: Request) -> Response:
        """A page of them, the last one first unless `order` is asc."""
        query = query_of(request, ("after", "limit", "order"))
        limit = number_of(query, "limit", DEFAULT_PAGE, MAX_PAGE)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid("order", f"{cut(order)!r} is not supported; accepted: asc, desc")
        items = [*self._stored(request).input_items]
        return json_response(
            page_of(items if order == "asc" else items[::-1], query.get("after"), limit)
        )

    # --- steps of a request ----------------------------------------------------------------------

    def _read(self, tenant: bytes, body: bytes) -> AskedChat:
        """Runs on any thread."""
        wire = decode(body, ResponsesRequest)
        self._answering.check_model(wire.model)
        if wire.store and not self._stores:
            raise invalid("store", "nothing is stored by this server; only false is accepted")
        before: Sequence[Json] = ()
        if (previous := wire.previous_response_id) is not None:
            stored = self._store.get(tenant, previous)
            if stored is None:
                raise _not_found(previous, "previous_response_id", 400)
            before = stored.messages
        return read_response(wire, before, self._answering.settings.default_sampling)

    def _translator(self, asked: AskedChat, job: Job, arrival: RequestHead) -> Translator:
        wire: ResponsesRequest = asked.body
        keeps = self._stores and wire.store is not False

        def on_end(body: Json) -> None:
            if body["status"] == "completed":
                body["completed_at"] = int(time.time())
            if not keeps or body["status"] == "failed":
                body["store"] = False
                return
            skipped = 0 if wire.instructions is None else 1
            before = [dict(message) for message in asked.prompt.messages[skipped:]]
            messages = [*before, *messages_of_output(body["output"])]
            if not self._store.put(arrival.tenant, body, messages, input_items(wire)):
                body["store"] = False  # it is too large

        return ResponsesTranslator(
            wire,
            ID_PREFIX + arrival.name,
            int(time.time()),
            AnswerReader(job.make_parser),
            self._answering.codec,
            on_end,
            model=self._answering.settings.served_model_name,
            stores=keeps,
            sampling=job.sampling,
        )

    def _stored(self, request: Request) -> Stored:
        response_id = request.path_params["id"]
        stored = self._store.get(_tenant(request), response_id)
        if stored is None:
            raise _not_found(response_id, "id", 404)
        return stored


def _not_found(response_id: str, field: str, status: int) -> ApiError:
    return ApiError(
        status,
        f"{field}: there is no stored response {response_id[:64]!r}",
        param=field,
        code="previous_response_not_found" if status == 400 else "not_found",
    )


def _tenant(request: Request) -> bytes:
    tenant: bytes = request.scope["state"].get("tenant", b"")
    return tenant
