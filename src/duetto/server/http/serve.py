"""Runs the application: socket, uvicorn, signals, an orderly end. Knows no routes."""

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from duetto.core.errors import ConfigError
from duetto.server.http.wire import BoundedHttp
from duetto.server.observe.logs import logged
from duetto.server.settings import ServerSettings

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 5
GRACE_S = 5  # from the last update to the end of its reply
HURRIED_GRACE_S = 1.0  # the same, once a second signal has come
BACKLOG = 2048
MAX_PORT = 65535
# Of a reply, in the kernel beside what is on its way; by default it grows to 4 MB for a client that
# reads nothing. The number is Linux's own (linux/tcp.h), which Python 3.11 has no name for.
UNSENT_BYTES = 64 * 1024
TCP_NOTSENT_LOWAT = 25
FAILED_EXIT_CODE = 70  # EX_SOFTWARE: whoever supervises the process may start it again
FAILED_GRACE_S = 1.0  # from the failure of the engine to the end of the process


def serve(
    app: Starlette,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    log_level: str = "info",
) -> None:
    """Serve until SIGTERM or SIGINT; then let running requests end; a second signal does not wait.

    `listener` is that of `listen`, and is closed at the end. Signals that come later are ignored:
    the process is to end with the server. If the engine's thread ends or hangs, clients are told,
    and the process ends with FAILED_EXIT_CODE, whatever is still running in it.
    """
    relay = app.state.relay
    relay.on_failure = _end_process
    with listener, logged(log_level):
        make_server(app, settings).run(sockets=[listener])
    if relay.failure is not None:
        _exit()


def _end_process(_reason: str) -> None:
    """Not on the event loop, which may hang too. A native call that hangs cannot be waited for."""
    time.sleep(FAILED_GRACE_S)  # for the last replies to leave
    _exit()


def _exit() -> None:
    logging.shutdown()
    sys.stderr.flush()
    os._exit(FAILED_EXIT_CODE)


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
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"--port {port}: must be from 0 (any that is free) to {MAX_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        in_use = error.errno == errno.EADDRINUSE
        cause = "another program is using it; choose another --port" if in_use else str(error)
        raise ConfigError(f"--host {host} --port {port}: {cause}") from None
    return listener


def make_server(
    app: Starlette, settings: ServerSettings, *, log_level: str | None = None
) -> "DrainingServer":
    """A server that is configured and not yet running. `log_level` is uvicorn's alone."""
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        loop="uvloop",
        lifespan="on",
        log_config=None,  # logs.py has it
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

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but what comes late is ignored: it would kill a process that is ending."""
        is_main = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        for number in handled:
            signal.signal(number, self.handle_exit)
        yield
        for number in handled:
            signal.signal(number, signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        relay = self._app.state.relay
        relay.is_stopping = True
        # Not uvicorn's force_exit, which breaks replies off: they end at once, but they end.
        relay.is_hurried = self.should_exit
        self.should_exit = True
        what = "ending at once" if relay.is_hurried else "running requests may end"
        logger.info("%s: %s", signal.Signals(sig).name, what)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Requests that outlast the time are ended by the engine, so that clients read a clean error
        # instead of a broken stream. The application's own end finds the engine stopped.
        draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        draining.cancel()

    async def _drain(self) -> None:
        relay = self._app.state.relay
        await relay.stop()
        while not relay.is_hurried:
            await asyncio.sleep(0.05)
        await asyncio.sleep(HURRIED_GRACE_S)
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedHttp):
                connection.cut()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
