"""What brings rows to the other side: TCP, without copies in this process, or through TLS, with.

A carrier knows parts: a header of a fixed size, and rows behind it. One thread may send while
another receives. (The ring of shared memory is in shared_memory.py.)
"""

import socket
from typing import Protocol

from duetto.cluster.links.channel import (
    GONE,
    LinkChannel,
    hang_up,
    receive_all_of,
    send_all_of,
    set_patience,
)
from duetto.cluster.links.headers import PART_BYTES
from duetto.cluster.links.link import BlockRows, LinkLost
from duetto.cluster.links.rows import receive_some, send_some, spans_of

_AT_A_TIME = 1 << 20  # bytes of one call


class Carrier(Protocol):
    """All methods but `close` raise LinkLost, OSError, or ValueError for rows that are none."""

    @property
    def part_bytes(self) -> int:
        """Of one part, at most, but for a block that has more."""
        ...

    def send_part(self, header: bytes, data: BlockRows) -> None: ...

    def receive_header(self) -> bytes | None:
        """Waits for it; None at the end."""
        ...

    def receive_rows(self, places: BlockRows) -> None: ...

    def drop_rows(self, num_bytes: int) -> None: ...

    def hang_up(self) -> None:
        """Whatever waits in it ends, soon."""
        ...

    def close(self) -> None:
        """Nobody is in it any more."""
        ...


class TCPCarrier:
    """From an arena's memory to the socket, and from a socket to an arena's memory."""

    part_bytes = 1 << 20  # of one connection before the next one's turn

    def __init__(self, wire: socket.socket, dead_after_s: float) -> None:
        self._wire = wire
        self._patience_s = dead_after_s
        set_patience(wire, dead_after_s)

    def send_part(self, header: bytes, data: BlockRows) -> None:
        flags = getattr(socket, "MSG_MORE", 0)  # rows follow
        try:
            start = self._wire.send(header, flags)
            if start < len(header):  # its buffer was full
                self._wire.sendall(header[start:])
            start, size = 0, data.num_bytes
            while start < size:
                start += send_some(self._wire, data, start, _AT_A_TIME)
        except BlockingIOError:
            raise LinkLost(f"the other side took nothing for {self._patience_s:g} s") from None

    def receive_header(self) -> bytes | None:
        return header_from(self._wire)

    def receive_rows(self, places: BlockRows) -> None:
        start, size = 0, places.num_bytes
        while start < size:
            start += self._some(receive_some(self._wire, places, start, _AT_A_TIME))

    def drop_rows(self, num_bytes: int) -> None:
        nowhere = memoryview(bytearray(min(num_bytes, _AT_A_TIME)))
        while num_bytes:
            num_bytes -= self._some(self._wire.recv_into(nowhere[:num_bytes]))

    def _some(self, came: int) -> int:
        if came == 0:
            raise LinkLost(GONE)
        return came

    def hang_up(self) -> None:
        hang_up(self._wire)

    def close(self) -> None:
        self._wire.close()


def header_from(wire: socket.socket) -> bytes | None:
    """The next part's, from a socket that has patience; None at the end."""
    header = b""
    while len(header) < PART_BYTES:
        try:
            came = wire.recv(PART_BYTES - len(header))
        except (BlockingIOError, InterruptedError):
            if header:
                raise
            continue  # nothing to do for a while
        if not came:
            if header:
                raise LinkLost(GONE)
            return None
        header += came
    return header


class TLSCarrier:
    """Bytes are encrypted: they are copied on the way."""

    part_bytes = 1 << 20

    def __init__(self, channel: LinkChannel, dead_after_s: float) -> None:
        self._channel = channel
        self._patience_s = dead_after_s

    def send_part(self, header: bytes, data: BlockRows) -> None:
        send_all_of(self._channel, memoryview(header), self._patience_s)
        for span in spans_of(data):
            send_all_of(self._channel, span, self._patience_s)

    def receive_header(self) -> bytes | None:
        header = bytearray(PART_BYTES)
        came = receive_all_of(self._channel, memoryview(header), None)
        return bytes(header) if came else None

    def receive_rows(self, places: BlockRows) -> None:
        for span in spans_of(places):
            receive_all_of(self._channel, span, self._patience_s)

    def drop_rows(self, num_bytes: int) -> None:
        nowhere = memoryview(bytearray(min(num_bytes, _AT_A_TIME)))
        while num_bytes:
            part = nowhere[:num_bytes]
            receive_all_of(self._channel, part, self._patience_s)
            num_bytes -= len(part)

    def hang_up(self) -> None:
        self._channel.hang_up()

    def close(self) -> None:
        self._channel.close()
