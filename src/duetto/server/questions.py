"""The routes that tell what happened: recent requests, one request's timeline, the last steps.

Every tenant sees its own requests only; of others' it sees what they added to a step. Knows what is
remembered (history.py) and no engine.
"""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.server.errors import ApiError, json_response
from duetto.server.explain import listed, so_far, timeline
from duetto.server.history import Ended, History, Running, reply_of
from duetto.server.relay import Relay
from duetto.server.settings import ServerSettings
from duetto.server.timeline import RoofTime, trace

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

    def routes(self) -> list[Route]:
        return [
            Route("/v1/requests", self.requests),
            Route("/v1/requests/{id:path}/timeline", self.timeline),
            Route("/debug/steps.json", self.steps),
        ]

    async def requests(self, request: Request) -> Response:
        """Those that ended of late, the last one first."""
        mine = self._history.ended(_tenant(request))
        return json_response({"object": "list", "data": [listed(ended) for ended in mine]})

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
        steps, now = history.steps(), self._clock()
        choices = [
            timeline(
                ended,
                steps,
                self._roof_time,
                tells_other_salts=self._settings.only_local_hosts,
            )
            for ended in mine
        ]
        choices += [
            so_far(
                each,
                steps,
                self._roof_time,
                now,
                is_whole=history.remembers_since(each.arrival_time),
            )
            for each in running
        ]
        choices.sort(key=lambda choice: str(choice["id"]))
        return json_response({"id": asked, "object": "timeline", "choices": choices})

    async def steps(self, request: Request) -> Response:
        """The last steps as a trace that Perfetto loads."""
        mine, steps = self._history.ended(_tenant(request)), self._history.steps()
        seen = {request_id for step in steps for request_id in step.request_ids}
        own = [ended for ended in reversed(mine) if ended.request_id in seen]
        # It can be megabytes: no stream should stutter while it is made.
        return await asyncio.to_thread(lambda: json_response(trace(steps, own, self._roof_time)))


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
