"""The sockets of one process to doors and workers: one thread, connections, and who is alive.

A connection is one TCP or Unix connection: when that ends, so does all that was under way on it,
and nothing of it comes later. Both sides send heartbeats; who is silent for `dead_after_s` is dead.
Knows frames, and what to do with heartbeats and goodbyes; not what the others say.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf
from threading import Thread, current_thread
from time import monotonic
from typing import Any, NamedTuple

import zmq

from duetto.cluster.address import WireAddress
from duetto.cluster.connection import Connection, ConnectionUser
from duetto.cluster.frames import (
    Bye,
    FrameError,
    Heartbeat,
    Hello,
    Knock,
    decode_frame,
    encoded,
)
from duetto.cluster.secret import ClusterSecret
from duetto.cluster.sockets import ENDS_OF_CALLERS, ENDS_OF_LISTENERS, BoundSocket, Sockets

logger = logging.getLogger(__name__)

DEAD_AFTER_S = 5.0
MAX_HEARTBEAT_S = 0.5  # between two; so dead_after_s may differ between two sides, above 2 s
MAX_PENDING_BYTES = 64 * 2**20  # that wait for one that does not read
MAX_CONNECTIONS = 4096  # of one listener
BLOCKED_RETRY_S = 0.002  # until a peer that reads too slowly is tried again
READ_AT_ONCE = 256  # frames of one socket, before others have their turn
BYE_S = 0.5  # that a goodbye waits for its answer: a connection that is cut loses what was sent
NOTICED_S = 0.02  # from the end of a connection until its socket knows
LATE_S = 0.25  # that a look at the clock may be late, before silence is not held against peers

NOBODY = "nobody listens there"
OTHER_SECRET = "it refuses us: it has another secret, or only one side has one"
GONE = "the connection has ended"
UNREAD = "it does not read what it is sent"
STOPPED_HERE = "this side has ended"


class _Listener(NamedTuple):
    socket: "zmq.Socket[bytes]"
    accept: Callable[[Connection], ConnectionUser]
    connections: dict[bytes, Connection]
    address: WireAddress


class Wire:
    """Any thread may call; what is told is told on the wire's own thread."""

    def __init__(
        self,
        secret: ClusterSecret | None = None,
        dead_after_s: float = DEAD_AFTER_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.clock = clock
        self.dead_after_s = dead_after_s
        self._beat_s = min(MAX_HEARTBEAT_S, dead_after_s / 4)
        self._sockets = Sockets(secret, dead_after_s)
        self._inbox: deque[Callable[[], None]] = deque()
        self._listeners: dict[Any, _Listener] = {}  # by socket
        self._callers: dict[Any, Connection] = {}  # by socket
        self._blocked: set[Connection] = set()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers, self._peers = count(), count()
        self._next_look = clock()
        self._stop_by = inf
        self._thread = Thread(target=self._run, name="duetto-wire", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    # --- any thread ----------------------------------------------------------------------------

    def bind(self, address: WireAddress, flag: str) -> BoundSocket:
        """Raises ConfigError, naming the flag, if the address cannot be had or is others' too."""
        return self._sockets.bind(address, flag)

    def listen(self, bound: BoundSocket, accept: Callable[[Connection], ConnectionUser]) -> None:
        """Let others connect: `accept` says who uses each connection."""
        self.call(lambda: self._listen(bound, accept))

    def connect(self, address: WireAddress, use: Callable[[Connection], ConnectionUser]) -> None:
        """Connect once. `use` is called at once, and is told soon if nobody is there."""
        self.call(lambda: self._connect(address, use))

    def call(self, function: Callable[[], None]) -> None:
        """Call it on the wire's thread."""
        self._inbox.append(function)
        self._sockets.wake()

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        at = self.clock() + delay_s
        self.call(lambda: self._at(at, function))

    def flush_soon(self, connection: Connection) -> None:
        self._inbox.append(lambda: self._flush(connection))
        self._sockets.wake()

    def stop(self, timeout: float = 2.0) -> bool:
        """End all connections, those that were closed with their goodbyes; False if the thread
        outlasts `timeout`."""
        self.call(self._stop)
        if self._thread.is_alive() and self._thread is not current_thread():
            self._thread.join(timeout)
        elif not self._thread.ident:  # never started
            self._close_all()
        return not self._thread.is_alive()

    # --- the wire's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self.clock() < self._stop_by and not self._is_done:
                self._turn()
        except Exception:
            logger.exception("the thread of the sockets ends: it raised what it must not")
        self._close_all()

    def _turn(self) -> None:
        due = min(
            self._stop_by, self._next_look, self._timers[0][0] if self._timers else self._next_look
        )
        wait_s = max(0.0, due - self.clock())
        if self._blocked:
            wait_s = min(wait_s, BLOCKED_RETRY_S)
        ready = self._sockets.poll(wait_s)
        for _ in range(len(self._inbox)):
            self._do(self._inbox.popleft())
        for socket in ready:
            if socket in self._listeners:
                self._read_listener(self._listeners[socket])
            elif socket in self._callers:
                self._read_caller(self._callers[socket])
            elif (watched := self._sockets.watched_by(socket)) is not None:
                self._hear_monitor(socket, watched)
        for connection in tuple(self._blocked):
            self._flush(connection)
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            self._do(heappop(self._timers)[2])
        if now >= self._next_look:
            self._look(now)

    def _do(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            logger.exception("what the thread of the sockets was asked to do failed")

    def _at(self, time: float, function: Callable[[], None]) -> None:
        heappush(self._timers, (time, next(self._numbers), function))

    def _listen(self, bound: BoundSocket, accept: Callable[[Connection], ConnectionUser]) -> None:
        self._listeners[bound.socket] = _Listener(bound.socket, accept, {}, bound.address)
        self._sockets.watch(bound.socket, ENDS_OF_LISTENERS)

    def _connect(self, address: WireAddress, use: Callable[[Connection], ConnectionUser]) -> None:
        if self._stop_by < inf:
            return
        socket = self._sockets.make(zmq.DEALER, listens=False)
        connection = Connection(self, str(address), socket, b"")
        self._callers[socket] = connection
        self._sockets.watch(socket, ENDS_OF_CALLERS)
        try:
            socket.connect(str(address))
        except zmq.ZMQError as error:
            connection.user = use(connection)
            self._lose(connection, error.strerror)
            return
        connection.user = use(connection)
        self._beat(connection, self.clock())

    # --- what comes

    def _read_listener(self, listener: _Listener) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                parts = listener.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            name, connection = parts[0], listener.connections.get(parts[0])
            if len(parts) != 2:
                if connection is not None:
                    self._refuse(connection, FrameError(f"no frame: {len(parts) - 1} parts"))
                continue
            if connection is None:
                connection = self._newcomer(listener, name, parts[1])
            if connection is not None:
                self._hear(connection, parts[1])

    def _newcomer(self, listener: _Listener, name: bytes, data: bytes) -> Connection | None:
        """Who says who it is; who says something else belonged to a connection that is over."""
        try:
            frame = decode_frame(data)
            if isinstance(frame, Bye):  # the answer to ours
                return None
            is_first = isinstance(frame, Knock | Hello)
        except FrameError as error:
            logger.warning("%s: %s", listener.address, error)
            is_first = False
        if not is_first or len(listener.connections) >= MAX_CONNECTIONS:
            reason = "is full" if is_first else "does not know you (any more)"
            with suppress(zmq.ZMQError):
                listener.socket.send_multipart((name, encoded(Bye(reason))), zmq.NOBLOCK)
            return None
        peer = f"{listener.address}#{next(self._peers)}"
        connection = Connection(self, peer, listener.socket, name)
        listener.connections[name] = connection
        connection.user = listener.accept(connection)
        self._beat(connection, self.clock())
        return connection

    def _read_caller(self, connection: Connection) -> None:
        for _ in range(READ_AT_ONCE):
            if connection.is_over:
                return
            try:
                parts = connection.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) == 1:
                self._hear(connection, parts[0])
            else:
                self._refuse(connection, FrameError(f"no frame: {len(parts)} parts"))

    def _hear(self, connection: Connection, data: bytes) -> None:
        connection.last_heard = now = self.clock()
        try:
            frame = decode_frame(data)
            if isinstance(frame, Heartbeat):
                connection.round_trip.heard(frame.time, frame.echo, frame.held_s, now)
            elif isinstance(frame, Bye):
                self._lose(connection, frame.reason[:400])  # and they know that it came
            elif connection.user is not None:
                connection.user.received(frame)
        except FrameError as error:
            self._refuse(connection, error)
        except Exception:
            logger.exception("%s: a frame could not be handled", connection.peer)
            self._lose(connection, "a frame could not be handled; the log says why")

    def _refuse(self, connection: Connection, error: FrameError) -> None:
        logger.warning("%s: %s", connection.peer, error)
        self._lose(connection, str(error))

    def _hear_monitor(self, monitor: Any, socket: Any) -> None:
        while (event := self._sockets.next_event(monitor)) is not None:
            listener = self._listeners.get(socket)
            if listener is not None:  # somebody has gone; the socket does not say who
                self._beat_all(listener)
                again = partial(self._beat_all, listener)  # once it knows itself
                self._at(self.clock() + NOTICED_S, again)
            elif (connection := self._callers.get(socket)) is not None:
                self._read_caller(connection)  # what it said last
                why: dict[int, str] = {zmq.EVENT_CLOSED: NOBODY, zmq.EVENT_DISCONNECTED: GONE}
                self._lose(connection, why.get(event, OTHER_SECRET), says_bye=False)

    # --- what goes

    def _flush(self, connection: Connection) -> None:
        if connection.is_over:
            self._blocked.discard(connection)
            return
        try:
            is_flushed = connection.is_flushed()
        except zmq.ZMQError:  # a listening socket knows no such connection
            self._lose(connection, GONE, says_bye=False)
            return
        if is_flushed:
            self._blocked.discard(connection)
            if connection.has_said_bye and connection.said_bye_at is None:
                connection.said_bye_at = self.clock()
        elif connection.num_pending_bytes > MAX_PENDING_BYTES:
            self._lose(connection, UNREAD)
        else:
            self._blocked.add(connection)

    def _beat(self, connection: Connection, now: float) -> None:
        connection.last_beat = now
        if connection.said_bye_at is not None:  # has it gone? A listening socket knows
            if not self._has_sent(connection, connection.round_trip.beat(now)):
                self._forget(connection)
        elif connection not in self._blocked:  # there is enough on its way
            connection.queue(encoded(connection.round_trip.beat(now)))
            self._flush(connection)

    def _beat_all(self, listener: _Listener) -> None:
        """Who has gone cannot be sent to, and is lost at once."""
        for connection in tuple(listener.connections.values()):
            self._beat(connection, self.clock())

    def _look(self, now: float) -> None:
        """Heartbeats to all, and an end of those that are silent."""
        late_s = now - self._next_look
        self._next_look = now + self._beat_s
        for connection in self._connections():
            if late_s > LATE_S:  # it is we who were away: stopped, or starved
                connection.last_heard = max(connection.last_heard, now - self.dead_after_s / 2)
            silent_s = now - connection.last_heard
            if connection.said_bye_at is not None and now - connection.said_bye_at > BYE_S:
                self._forget(connection)
            elif silent_s > self.dead_after_s:
                self._lose(connection, f"silent for {silent_s:.1f} s")
            elif now - connection.last_beat >= self._beat_s / 2:
                self._beat(connection, now)

    def _connections(self) -> list[Connection]:
        found = list(self._callers.values())
        for listener in self._listeners.values():
            found += listener.connections.values()
        return found

    # --- the end

    def _lose(self, connection: Connection, reason: str, *, says_bye: bool = True) -> None:
        user = connection.end()
        if says_bye:
            self._has_sent(connection, Bye(reason[:400]))
        self._forget(connection)
        if user is not None:
            self._do(partial(user.lost, reason))

    def _has_sent(self, connection: Connection, frame: Bye | Heartbeat) -> bool:
        """Past all that waits; False if nobody is there, or does not read."""
        parts = (connection.name, encoded(frame)) if connection.name else (encoded(frame),)
        try:
            connection.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _forget(self, connection: Connection) -> None:
        connection.end()
        self._blocked.discard(connection)
        listener = self._listeners.get(connection.socket)
        if listener is not None:
            listener.connections.pop(connection.name, None)
        elif self._callers.pop(connection.socket, None) is not None:
            self._sockets.close(connection.socket)

    @property
    def _is_done(self) -> bool:
        return self._stop_by < inf and not self._connections()

    def _stop(self) -> None:
        self._stop_by = self.clock() + BYE_S
        for connection in self._connections():
            user = connection.user
            connection.queue(encoded(Bye(STOPPED_HERE)), is_last=True)
            self._flush(connection)
            if user is not None:
                self._do(partial(user.lost, STOPPED_HERE))

    def _close_all(self) -> None:
        for connection in self._connections():
            self._lose(connection, STOPPED_HERE)
        self._listeners.clear()
        self._sockets.close_all()
