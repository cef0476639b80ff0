"""Which web pages may use the server: the CORS headers, and the guard of a server without keys.

A page is known by its origin, which its browser sends and the page cannot change. Programs that
are no browsers send none, and none of this is about them.
"""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from duetto.core.errors import ConfigError
from duetto.server.http.errors import ApiError, error_response

LOCAL_HOST = r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?"
LOCAL_ORIGIN = f"https?://{LOCAL_HOST}"
FLAG = "--allowed-origins"
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/?#@\s,'\"\[\]*]*|\[[0-9a-f:.]+\](:[0-9]{1,5})?)",
)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
# What a page may send to any server without asking it first (Fetch, "CORS-safelisted").
_UNASKED_TYPES = frozenset(
    {"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"}
)


class Origins:
    """A list of origins. Raises ConfigError, naming the flag, for what is none."""

    def __init__(self, listed: Sequence[str] = ()) -> None:
        """Each is an exact origin, `null`, every origin of an application's own scheme as
        `scheme://*`, or `*` for all. An empty list: pages of this machine."""
        self.are_all = "*" in listed
        patterns = [_pattern(origin) for origin in listed if origin != "*"]
        self.pattern = "|".join(patterns) if listed else LOCAL_ORIGIN

    def allow(self, origin: str) -> bool:
        return self.are_all or re.fullmatch(self.pattern, origin) is not None

    def cors(self) -> Middleware:
        """Answers browsers that ask whether a page may, and says so beside each reply."""
        return Middleware(
            CORSMiddleware,
            allow_origins=["*"] if self.are_all else [],
            allow_origin_regex=self.pattern,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # where the origin is allowed
            expose_headers=["X-Request-Id", "Retry-After"],
        )


class OriginGuard:
    """Refuses what a page of a foreign origin sends without asking first.

    A browser hides the reply from the page, but by then it would have been computed. With keys
    there is no need: the header of a key makes a browser ask.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = Headers(scope=scope)
            if _is_unasked(headers) and not self._may_send(headers):
                error = ApiError(
                    403,
                    f"a web page of another origin sent this; {FLAG} lists those that may, and "
                    f"they send Content-Type: application/json",
                    code="origin_not_allowed",
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _may_send(self, headers: Headers) -> bool:
        origins = headers.getlist("origin")
        if self._origins.are_all:
            return True
        if not origins:  # no browser, or an old one that says nothing
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        own = {f"{scheme}://{headers.get('host', '')}" for scheme in ("http", "https")}
        return all(origin in own or self._origins.allow(origin) for origin in origins)


def _is_unasked(headers: Headers) -> bool:
    kinds = headers.getlist("content-type") or [""]
    return any(kind.partition(";")[0].strip().lower() in _UNASKED_TYPES for kind in kinds)


def _pattern(origin: str) -> str:
    """The regular expression of one listed origin, written as browsers write it."""
    plain = origin.strip().lower()
    if plain == "null":
        return plain
    found = _ORIGIN.fullmatch(plain.removesuffix("*"))
    if not plain.isascii():
        raise ConfigError(
            f"{FLAG} {origin!r:.100}: browsers write other letters in ASCII, as xn--...; "
            f"their developer tools show it as location.origin"
        )
    if found is None:
        raise ConfigError(
            f"{FLAG} {origin!r:.100}: not an origin; accepted: https://app.example:8443 (no path), "
            f"chrome-extension://ID, app://*, null, or * for all; repeat the flag for more"
        )
    scheme, host = found["scheme"], found["host"]
    if plain.endswith("*"):
        if host or scheme in _DEFAULT_PORTS:
            raise ConfigError(
                f"{FLAG} {origin!r:.100}: only whole schemes of applications (app://*) and * "
                f"stand for several origins; list each site"
            )
        return re.escape(f"{scheme}://") + ".*"
    if not host and scheme in _DEFAULT_PORTS:
        raise ConfigError(f"{FLAG} {origin!r:.100}: a host is missing")
    return re.escape(f"{scheme}://{host.removesuffix(_DEFAULT_PORTS.get(scheme, ''))}")
