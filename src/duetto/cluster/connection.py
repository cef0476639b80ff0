"""One end of a connection to another process: what waits to be sent, and when it was last heard."""

from collections import deque
from threading import Lock
from typing import Protocol

import zmq

from duetto.cluster.frames import Bye, Frame, encoded
from duetto.cluster.round_trip import RoundTrip


class ConnectionUser(Protocol):
    """Who uses one end. Called on the wire's thread; must not block."""

    def received(self, frame: Frame) -> None:
        """Raises FrameError for what cannot be at this point; that ends the connection."""
        ...

    def lost(self, reason: str) -> None:
        """Nothing comes any more, and nothing goes. Told once, and not after `close`."""
        ...


class Flushing(Protocol):
    """What of a Wire its connections use."""

    def clock(self) -> float: ...

    def flush_soon(self, connection: "Connection") -> None:
        """Send what waits, on the wire's thread."""
        ...


class Connection:
    """One end of a connection to another process. Any thread may send or close; neither blocks."""

    def __init__(self, wire: Flushing, peer: str, socket: "zmq.Socket[bytes]", name: bytes) -> None:
        self.peer = peer  # for people
        self.round_trip = RoundTrip()
        self._wire = wire
        self._lock = Lock()
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._says_bye = False  # the last of what waits is a goodbye
        self.is_over = False
        # --- of the wire's thread
        self.socket = socket
        self.name = name  # what a listening socket calls it; b"" of one that connects
        self.user: ConnectionUser | None = None
        self.last_heard = self.last_beat = wire.clock()
        self.said_bye_at: float | None = None  # its goodbye has gone; it waits for theirs

    @property
    def num_pending_bytes(self) -> int:
        return self._pending_bytes

    def send(self, data: bytes) -> None:
        """Send an encoded frame, after those before it. To one that is lost nothing is sent; one
        that does not read is lost."""
        if self.queue(data):
            self._wire.flush_soon(self)

    def close(self, reason: str) -> None:
        """Say goodbye, after what was sent; `lost` is not told any more."""
        if self.queue(encoded(Bye(reason)), is_last=True):
            self._wire.flush_soon(self)

    def queue(self, data: bytes, *, is_last: bool = False) -> bool:
        """Whether somebody must flush, as nobody is about to."""
        with self._lock:
            if self.is_over or self._says_bye:
                return False
            was_empty = not self._pending
            self._pending.append(data)
            self._pending_bytes += len(data)
            if is_last:
                self._says_bye, self.user = True, None
            return was_empty

    # --- on the wire's thread

    def is_flushed(self) -> bool:
        """Send what can be sent; whether that was all. Raises zmq.ZMQError if nobody is there."""
        while self._pending:
            try:
                parts = (self.name, self._pending[0]) if self.name else (self._pending[0],)
                self.socket.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:
                return False
            with self._lock:
                self._pending_bytes -= len(self._pending.popleft())
        return True

    @property
    def has_said_bye(self) -> bool:
        with self._lock:
            return self._says_bye and not self._pending

    def end(self) -> ConnectionUser | None:
        """It is over; whom to tell."""
        with self._lock:
            self.is_over = True
            self._pending.clear()
            self._pending_bytes = 0
            user, self.user = self.user, None
        return user
