"""ZeroMQ sockets with the keys and bounds of doors and workers, and what one thread polls of them.

Knows no frames.
"""

from contextlib import suppress
from math import ceil
from pathlib import Path
from socket import socketpair
from typing import Any, NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from duetto.cluster.address import WireAddress, check_exposure_of, check_free, in_use
from duetto.cluster.frames import MAX_FRAME_BYTES
from duetto.cluster.secret import ClusterSecret, Gatekeeper, guard
from duetto.core.errors import ConfigError

QUEUED_FRAMES = 200  # that ZeroMQ holds for one peer, beside what waits before it
LINGER_MS = 500  # for goodbyes to leave

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
ENDS_OF_LISTENERS = zmq.EVENT_DISCONNECTED  # of one of its connections: it is not told which
ENDS_OF_CALLERS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _HANDSHAKE_FAILED


class BoundSocket(NamedTuple):
    """A socket that listens, and answers nobody yet."""

    socket: "zmq.Socket[bytes]"
    address: WireAddress


class Sockets:
    """Made and bound by any thread; the others' methods are of the thread that polls."""

    def __init__(self, secret: ClusterSecret | None, dead_after_s: float) -> None:
        self._secret = secret
        self._dead_after_s = dead_after_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.gatekeeper = None if secret is None else Gatekeeper(self._context, secret)
        self._bound: list[zmq.Socket[bytes]] = []
        self._monitors: dict[Any, zmq.Socket[bytes]] = {}  # monitoring sockets: of which
        self._wake_in, self._wake_out = socketpair()
        self._is_woken = False
        self._poller = zmq.Poller()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._poller.register(self._wake_in.fileno(), zmq.POLLIN)

    # --- any thread

    def bind(self, address: WireAddress, flag: str) -> BoundSocket:
        """Raises ConfigError, naming the flag, if the address cannot be had or is others' too."""
        check_exposure_of(address, flag, self._secret)
        check_free(address, flag)
        made = self.make(zmq.ROUTER, listens=True)
        made.setsockopt(zmq.ROUTER_MANDATORY, 1)  # who is gone is an error, not a silence
        try:
            made.bind(str(address))
        except zmq.ZMQError as error:
            made.close()
            if error.errno == zmq.EADDRINUSE:
                raise in_use(address, flag) from None
            raise ConfigError(f"{flag} {address}: {error.strerror}") from None
        self._bound.append(made)
        if address.kind == "ipc":
            Path(address.path).chmod(0o600)
            return BoundSocket(made, address)
        bound = made.getsockopt_string(zmq.LAST_ENDPOINT)
        return BoundSocket(made, address._replace(port=int(bound.rpartition(":")[2])))

    def make(self, kind: int, *, listens: bool) -> "zmq.Socket[bytes]":
        """With its keys and bounds, and no connection."""
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, LINGER_MS)
        made.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        made.setsockopt(zmq.SNDHWM, QUEUED_FRAMES)
        made.setsockopt(zmq.RCVHWM, QUEUED_FRAMES)
        made.setsockopt(zmq.IPV6, 1)
        made.setsockopt(zmq.RECONNECT_IVL, -1)  # another connection is another one
        dead_after_ms = max(1000, int(self._dead_after_s * 1000))
        made.setsockopt(zmq.HANDSHAKE_IVL, dead_after_ms)
        made.setsockopt(zmq.HEARTBEAT_IVL, dead_after_ms // 2)  # so that a dead one is let go
        made.setsockopt(zmq.HEARTBEAT_TIMEOUT, dead_after_ms)
        guard(made, self._secret, listens=listens)
        return made

    def wake(self) -> None:
        """End the poll that is under way, or the next one."""
        if not self._is_woken:
            self._is_woken = True
            with suppress(OSError):  # it has ended, or is being woken already
                self._wake_out.send(b"\0")

    # --- the thread that polls

    def poll(self, wait_s: float) -> list[Any]:
        """The sockets that have something to say, monitoring ones among them."""
        ready = dict(self._poller.poll(ceil(wait_s * 1000)))
        if ready.pop(self._wake_in.fileno(), None):
            with suppress(BlockingIOError):
                self._wake_in.recv(64)
            self._is_woken = False  # before what woke it is looked at: what comes later wakes again
        return list(ready)

    def watch(self, socket: "zmq.Socket[bytes]", events: int) -> None:
        """Poll it, and what happens to its connections."""
        monitor = socket.get_monitor_socket(events)
        self._monitors[monitor] = socket
        for each in (socket, monitor):
            self._poller.register(each, zmq.POLLIN)

    def watched_by(self, monitor: Any) -> "zmq.Socket[bytes] | None":
        """The socket that it monitors, if it is a monitoring one."""
        return self._monitors.get(monitor)

    def next_event(self, monitor: Any) -> int | None:
        """What happened to the socket that it monitors; None: nothing more, or it is closed."""
        if monitor not in self._monitors:
            return None
        try:
            return int(parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"])
        except zmq.Again:
            return None

    def close(self, socket: "zmq.Socket[bytes]") -> None:
        monitor = next(m for m, watched in self._monitors.items() if watched is socket)
        del self._monitors[monitor]
        for each in (socket, monitor):
            self._poller.unregister(each)
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close()

    def close_all(self) -> None:
        for socket in tuple(self._monitors.values()):
            self.close(socket)
        for socket in self._bound:  # those too on which nobody has listened
            socket.close()
        self._context.term()
        self._wake_in.close()
        self._wake_out.close()
