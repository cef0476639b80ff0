"""A socket's bytes without waiting: plain, or through TLS. What the control channel, and a carrier
of rows, are made of. Knows nothing of what the bytes are."""

import socket
import ssl
import struct
from contextlib import suppress
from select import POLLIN, POLLOUT, poll
from threading import Lock
from time import monotonic
from typing import Protocol

from duetto.cluster.links.link import LinkLost

GONE = "the other side closed the link, or is gone"


def set_patience(wire: socket.socket, seconds: float) -> None:
    """How long one call of the system waits before it says EAGAIN."""
    whole = int(seconds)
    value = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    wire.setblocking(True)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        wire.setsockopt(socket.SOL_SOCKET, option, value)


def hang_up(wire: socket.socket) -> None:
    """Wakes whoever waits for it, in this process too; its number stays taken."""
    with suppress(OSError):
        socket.socket.shutdown(wire, socket.SHUT_RDWR)


class LinkChannel(Protocol):
    """Both directions of one connection. One thread may send while another receives."""

    def send_now(self, data: memoryview) -> int:
        """How many bytes went; 0 if none can now. Raises OSError."""
        ...

    def receive_now(self, into: memoryview) -> int | None:
        """How many bytes came, 0 at the end; None if there are none now. Raises OSError."""
        ...

    def fileno(self) -> int: ...

    def hang_up(self) -> None: ...

    def close(self) -> None: ...


class PlainChannel:
    def __init__(self, wire: socket.socket) -> None:
        wire.setblocking(False)
        self._wire = wire

    def send_now(self, data: memoryview) -> int:
        try:
            return self._wire.send(data, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return 0

    def receive_now(self, into: memoryview) -> int | None:
        try:
            return self._wire.recv_into(into, 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return None

    def fileno(self) -> int:
        return self._wire.fileno()

    def hang_up(self) -> None:
        hang_up(self._wire)

    def close(self) -> None:
        self._wire.close()


class TLSChannel:
    """OpenSSL lets one thread at a time into a connection, so nobody waits inside."""

    def __init__(self, wire: ssl.SSLSocket) -> None:
        wire.setblocking(False)
        self._wire = wire
        self._lock = Lock()

    def send_now(self, data: memoryview) -> int:
        try:
            with self._lock:
                return self._wire.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def receive_now(self, into: memoryview) -> int | None:
        try:
            with self._lock:
                return self._wire.recv_into(into)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return 0

    def fileno(self) -> int:
        return self._wire.fileno()

    def hang_up(self) -> None:
        hang_up(self._wire)

    def close(self) -> None:
        self._wire.close()


def send_all_of(channel: LinkChannel, data: memoryview, patience_s: float) -> None:
    """Raises LinkLost if nothing goes for so long."""
    last = monotonic()
    while data:
        if sent := channel.send_now(data):
            data, last = data[sent:], monotonic()
        elif monotonic() - last > patience_s:
            raise LinkLost(f"the other side took nothing for {patience_s:g} s")
        else:
            _wait(channel, POLLOUT, patience_s)


def receive_all_of(channel: LinkChannel, into: memoryview, patience_s: float | None) -> bool:
    """False at the end, if nothing has come. None: the first byte may take any time. Raises
    LinkLost for an end in the middle, or a silence there."""
    size, last = len(into), monotonic()
    while into:
        came = channel.receive_now(into)
        if came:
            into, last = into[came:], monotonic()
        elif came == 0:
            if len(into) == size and patience_s is None:
                return False
            raise LinkLost(GONE)
        elif patience_s is not None and monotonic() - last > patience_s:
            raise LinkLost(f"the other side sent nothing for {patience_s:g} s, amid rows")
        else:
            _wait(channel, POLLIN, patience_s or 1.0)
    return True


def _wait(channel: LinkChannel, for_what: int, seconds: float) -> None:
    poller = poll()
    poller.register(channel.fileno(), for_what)
    poller.poll(max(1, int(min(seconds, 1.0) * 1000)))
