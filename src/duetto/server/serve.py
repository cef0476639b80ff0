"""Runs the application: socket, uvicorn, signals, an orderly end. Knows no routes."""

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from duetto.core.errors import ConfigError
from duetto.server.settings import ServerSettings
from duetto.server.wire import BoundedHttp

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 5
GRACE_S = 5  # from the last update to the end of its reply
BACKLOG = 2048


def serve(
    app: Starlette,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    log_level: str = "info",
) -> None:
    """Serve until SIGTERM or SIGINT; then let running requests end; a second signal does not wait.

    `listener` is that of `listen`, and is closed at the end.
    """
    with listener:
        make_server(app, settings, log_level=log_level).run(sockets=[listener])


def listen(
    host: str, port: int, *, api_keys: Sequence[str] = (), insecure_no_auth: bool = False
) -> socket.socket:
    """A listening socket: to be had before a model is loaded, as it is what most often fails.

    Raises ConfigError if the address cannot be had, or is public while there is no API key.
    """
    check_exposure(host, api_keys, insecure_no_auth=insecure_no_auth)
    return bind(host, port)


def check_exposure(host: str, api_keys: Sequence[str], *, insecure_no_auth: bool) -> None:
    """Raise ConfigError if anyone on a network could use the server without a key."""
    if api_keys or insecure_no_auth or _is_loopback(host):
        return
    raise ConfigError(
        f"--host {host}: others can reach this address; give --api-key, keep to 127.0.0.1, "
        f"or say --insecure-no-auth"
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        cause = "another program is using it; choose another --port" if in_use else str(error)
        raise ConfigError(f"--host {host} --port {port}: {cause}") from None
    return listener


def make_server(
    app: Starlette, settings: ServerSettings, *, log_level: str = "info"
) -> "DrainingServer":
    """A server that is configured and not yet running."""
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        loop="uvloop",
        lifespan="on",
        log_level=log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(settings.shutdown_timeout_s) + GRACE_S,
    )
    return DrainingServer(config, app)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, told once to let requests end, told twice to end at once; exits with 0."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # Not uvicorn's own, which raises the signal again at the end, so that the exit code is -15.
        self._app.state.relay.is_stopping = True
        self.force_exit = self.should_exit
        self.should_exit = True
        what = "ending at once" if self.force_exit else "running requests may end"
        logger.info("%s: %s", signal.Signals(sig).name, what)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Requests that outlast the time are ended by the engine, so that clients read a clean error
        # instead of a broken stream. The application's own end finds the engine stopped.
        draining = asyncio.create_task(self._app.state.relay.stop())
        await super().shutdown(sockets)
        draining.cancel()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
