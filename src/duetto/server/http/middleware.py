"""What surrounds every request: its id, its count, its key, the catching of bugs. Plain ASGI."""

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from time import monotonic

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duetto.server.http.errors import ApiError, error_response, internal_error
from duetto.server.http.origins import LOCAL_HOST
from duetto.server.observe.journal import Journal
from duetto.server.observe.metrics import Metrics

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})  # all others need a key
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MAX_ID_CHARS = 128
WITH_IDS = (("/v1/models/", "/v1/models/{id}"), ("/v1/requests/", "/v1/requests/{id}/timeline"))
HEALTH_PATHS = frozenset({"/health", "/ping"})


class RequestFrame:
    """Gives every reply an X-Request-Id, counts and logs it, and answers a bug with a plain 500.

    One name runs through the header, the reply's id, the log and the timeline: the caller's own
    label (`scope["state"]["request_label"]`), or our id (`"request_id"`). The engine knows a
    request by our id alone; of a label that comes again, the name in the reply, the log and the
    timeline has an addition (History.claim).
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, journal: Journal, handlers: frozenset[str]
    ) -> None:
        """`handlers` are the fixed paths that are counted under their own name."""
        self._app = app
        self._metrics = metrics
        self._journal = journal
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        name = label(Headers(scope=scope).get("x-request-id")) or request_id
        state = scope.setdefault("state", {})
        state["request_id"], state["request_label"] = request_id, name
        status, start = 0, monotonic()

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self._app(scope, receive, send_framed)
        except Exception:
            logger.exception("request %s met a bug", name)
            if status:  # too late for a status: uvicorn closes the connection
                raise
            await error_response(internal_error())(scope, receive, send_framed)
        finally:
            handler, method = self._labels(scope)
            self._metrics.record_http(handler, method, status or 499, monotonic() - start)
            reason, param = state.get("reason", ""), state.get("param")
            self._journal.record_reply(
                request_id, name, handler, method, status or 499, reason, param
            )

    def _labels(self, scope: Scope) -> tuple[str, str]:
        path, method = scope["path"], scope["method"]
        handler = next((h for prefix, h in WITH_IDS if path.startswith(prefix)), path)
        known = handler in self._handlers or any(handler == h for _, h in WITH_IDS)
        return handler if known else "other", method if method in METHODS else "other"


class HostGuard:
    """Refuses what was not asked of this machine by a local name, on every path but health.

    Against DNS rebinding: a page whose own name has been made to point here is same-origin with
    us, so only the Host header tells it apart. A server with keys needs no such guard.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] not in HEALTH_PATHS:
            hosts = Headers(scope=scope).getlist("host")
            if not hosts or not all(re.fullmatch(LOCAL_HOST, h, re.IGNORECASE) for h in hosts):
                error = ApiError(
                    403,
                    "the Host header does not name this machine: without --api-key the server "
                    "answers only as localhost, 127.0.0.1 or [::1]",
                    code="host_not_allowed",
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class KeyGuard:
    """Refuses whatever brings none of the keys, on every path that is not in OPEN_PATHS.

    Decides on the ASGI path, which routing uses too, never on a URL built from the Host header. A
    digest of the key becomes `scope["state"]["tenant"]`.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        reply: Callable[[str, ApiError], Response] = lambda _, error: error_response(error),
    ) -> None:
        """`reply(path, error)` says it in the words of the API that was asked."""
        self._app = app
        self._reply = reply
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._digests or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        digest = self._digest_of(Headers(scope=scope))
        if digest is None:
            error = ApiError(
                401,
                "a valid API key is needed, as the header 'Authorization: Bearer KEY' or "
                "'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await self._reply(scope["path"], error)(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = digest
        await self._app(scope, receive, send)

    def _digest_of(self, headers: Headers) -> bytes | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":  # as Anthropic's clients send it
            key = headers.get("x-api-key", "")
        given = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given if any(matches) else None


def label(caller_id: str | None) -> str:
    """The caller's id without what could forge a header or a log line; empty if there is none."""
    return re.sub(r"[^\w.:/+=@-]", "", caller_id or "", flags=re.ASCII)[:MAX_ID_CHARS]
