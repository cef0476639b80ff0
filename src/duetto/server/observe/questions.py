"""The routes that tell what happened: recent requests, one request's timeline, the last steps.

Every tenant sees its own requests only; of others' it sees what they added to a step. Knows what is
remembered (history.py) and no engine.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.server.http.errors import ApiError, overloaded
from duetto.server.http.json_parts import (
    NUM_AT_ONCE,
    Json,
    JsonRows,
    PartsResponse,
    json_parts,
    packed,
)
from duetto.server.observe.explain import listed, so_far, timeline
from duetto.server.observe.history import Ended, History, Running, reply_of
from duetto.server.observe.timeline import Pace, RoofTime, Steps, trace
from duetto.server.relay import Relay
from duetto.server.settings import ServerSettings

MAX_ASKED = 64  # questions that wait for their turn or are answered

_PREFIXES = ("chatcmpl-", "cmpl-")


class Questions:
    """The handlers, one method each."""

    def __init__(
        self, relay: Relay, settings: ServerSettings, roof_time: RoofTime | None = None
    ) -> None:
        self._history = relay.history
        self._clock = relay.clock
        self._settings = settings
        self._roof_time = roof_time
        self._turn = asyncio.Semaphore(1)
        self._num_asked = 0

    def routes(self) -> list[Route]:
        return [
            Route("/v1/requests", self.requests),
            Route("/v1/requests/{id:path}/timeline", self.timeline),
            Route("/debug/steps.json", self.steps),
        ]

    async def requests(self, request: Request) -> Response:
        """Those that ended of late, the last one first."""
        mine = self._history.ended(_tenant(request))
        return await self._made(lambda: _around({"object": "list"}, "data", map(listed, mine)))

    async def timeline(self, request: Request) -> Response:
        """Every choice of a reply, by the reply's id; or one, by its own. Of one that is still
        running, what it did so far."""
        asked = request.path_params["id"]
        history, tenant = self._history, _tenant(request)
        ended, running = history.ended(tenant), history.running(tenant)
        name = _sought(asked, history, tenant, [*reversed(running), *ended])
        mine = [e for e in ended if _is_of(e, name)]
        running = [r for r in running if _is_of(r, name)]
        if not mine and not running:
            raise ApiError(
                404,
                "no request of this id runs or has ended of late; /v1/requests lists those that "
                "have",
                param="id",
                code="request_not_found",
            )
        both: list[Ended | Running] = [*mine, *running]
        both.sort(key=lambda one: one.request_id)
        records, now = history.steps(), self._clock()
        since = {each.request_id: history.remembers_since(each.arrival_time) for each in running}
        tells_other_salts = self._settings.only_local_hosts
        methods = self._settings.max_drafts

        def choices() -> Iterator[Json]:
            steps = Steps(records, [one.request_id for one in both], self._roof_time)
            for one in both:
                if isinstance(one, Ended):
                    yield timeline(one, steps, tells_other_salts=tells_other_salts, methods=methods)
                else:
                    yield so_far(one, steps, now, is_whole=since[one.request_id])

        head = {"id": asked, "object": "timeline"}
        return await self._made(lambda: _around(head, "choices", choices()))

    async def steps(self, request: Request) -> Response:
        """The last steps as a trace that Perfetto loads."""
        records, mine = self._history.steps(), self._history.ended(_tenant(request))[::-1]
        head = {"displayTimeUnit": "ms"}
        return await self._made(
            lambda: _around(head, "traceEvents", trace(records, mine, self._roof_time))
        )

    async def _made(self, parts: Callable[[], Iterator[bytes]]) -> Response:
        """A reply that a thread makes in small parts: it can be megabytes, and no stream should
        stutter meanwhile. One at a time. Raises ApiError 503 if too many wait."""
        if self._num_asked >= MAX_ASKED:
            raise overloaded(f"{self._num_asked} such questions wait; try again later")
        self._num_asked += 1
        try:
            async with self._turn:
                return PartsResponse(await asyncio.to_thread(lambda: packed(parts())))
        finally:
            self._num_asked -= 1


def _around(head: Json, name: str, items: Iterable[Json]) -> Iterator[bytes]:
    """The JSON of `head` with the list of the items as one more field, item by item."""
    yield msgspec.json.encode(head)[:-1] + b"," + msgspec.json.encode(name) + b":["
    for place, item in enumerate(items):
        if place:
            yield b","
        yield from _item_parts(item)
    yield b"]}"


def _item_parts(item: Json) -> Iterator[bytes]:
    """One with as many segments as there are steps is a megabyte."""
    pace = Pace()
    segments: list[Json] = item.get("segments", [])
    if len(segments) <= NUM_AT_ONCE:
        yield msgspec.json.encode(item)
        return

    def rows(start: int, end: int) -> list[Json]:
        pace.did(NUM_AT_ONCE)
        return segments[start:end]

    yield from json_parts({**item, "segments": JsonRows(len(segments), rows)})


def _sought(
    asked: str, history: History, tenant: bytes, newest_first: Sequence[Ended | Running]
) -> str:
    """Our id of what is asked for, by whatever its client knows it. A label that came with several
    requests means the newest, a reply's id just that reply."""
    names = [asked, *(asked.removeprefix(p) for p in _PREFIXES if asked.startswith(p))]
    named = [reply_of(one.request_id) for one in newest_first if one.name in names]
    newest = history.newest(tenant, asked)
    if newest is not None and any(reply_of(one.request_id) == newest for one in newest_first):
        named.insert(0, newest)
    return named[0] if named else names[-1]


def _is_of(one: Ended | Running, name: str) -> bool:
    return one.request_id == name or one.request_id.startswith(f"{name}-")


def _tenant(request: Request) -> bytes:
    tenant: bytes = request.scope.get("state", {}).get("tenant", b"")
    return tenant
