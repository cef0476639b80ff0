"""KV links between two processes of one machine: frames through a Unix socket, rows through a ring
of shared memory, from which each side copies into its own arena.

The arena itself is not shared: a process that was stopped, is given up and wakes up later can then
write into nobody's blocks. A ring serves one link and is never used again.
"""

import fcntl
import mmap
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import numpy as np
from numpy.typing import NDArray

from duetto.cluster.links.carriers import Carrier, header_from
from duetto.cluster.links.channel import GONE, LinkChannel, PlainChannel, hang_up, set_patience
from duetto.cluster.links.link import BlockRows, LinkLost
from duetto.cluster.links.rows import HAS_NATIVE
from duetto.cluster.links.tcp import LINK_FLAG
from duetto.core.errors import ConfigError

with suppress(ImportError):  # check_can_share says so
    import duetto._native as native

RING_BYTES = 2 << 20
HEADER_BYTES = 4096  # of csrc/ring.h
MAX_RING_BYTES = 64 << 20
_SEALS_ARE_THERE = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
_BROKEN = -2
SCHEME = "shm://"
ANY_NAME = "shm://*"


def check_can_share() -> None:
    """Raises ConfigError where there is no such memory."""
    if not (HAS_NATIVE and _SEALS_ARE_THERE and hasattr(socket, "SO_PEERCRED")):
        raise ConfigError(
            f"{LINK_FLAG} shm://: needs Linux and the native module; tcp://127.0.0.1:0 is accepted"
        )


class SharedMemoryMedium:
    """A Unix socket: `shm:///path`, or `shm://@name`, which is in no folder; `shm://*` to listen at
    a name that nobody has."""

    num_carriers = 1

    def __init__(self, address: str, *, ring_bytes: int = RING_BYTES) -> None:
        """Raises ConfigError for another address."""
        check_can_share()
        name = address.removeprefix(SCHEME)
        if address == ANY_NAME:
            name = f"@duetto-kv-{os.getpid()}-{token_hex(8)}"
        if not address.startswith(SCHEME) or name[:1] not in ("/", "@") or len(name) < 2:
            raise ConfigError(
                f"{LINK_FLAG} {address:.160}: accepted: shm:///path/of/a/socket, shm://@name or "
                f"{ANY_NAME}"
            )
        if len(name.encode()) > 107 or "\0" in name:
            raise ConfigError(f"{LINK_FLAG} {address:.160}: at most 107 bytes are accepted")
        self._name = name
        self._place = "\0" + name[1:] if name[0] == "@" else name
        self._ring_bytes = ring_bytes

    def listen(self) -> tuple[socket.socket, str]:
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            wire.bind(self._place)
            wire.listen(64)
        except OSError as error:
            wire.close()
            raise ConfigError(
                f"{LINK_FLAG} {SCHEME}{self._name}: {error.strerror}; choose another one"
            ) from None
        return wire, SCHEME + self._name

    def tidy(self) -> None:
        if self._name[0] == "/":
            with suppress(OSError):
                Path(self._name).unlink()

    def connect(self, timeout_s: float) -> socket.socket:
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            wire.settimeout(timeout_s)
            wire.connect(self._place)
            return self.accepted(wire)
        except (OSError, LinkLost) as error:
            wire.close()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise LinkLost(f"{SCHEME}{self._name}: {error.strerror}") from None
            raise

    def accepted(self, wire: socket.socket) -> socket.socket:
        pid, user, _ = struct.unpack(
            "3i", wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        )
        if user != os.geteuid():
            raise LinkLost(f"process {pid} is of user {user}; accepted: user {os.geteuid()}")
        return wire

    def channel(self, wire: socket.socket) -> LinkChannel:
        return PlainChannel(wire)

    def carrier(self, wire: socket.socket, dead_after_s: float) -> Carrier:
        """Each side makes the ring that it writes, and gives it to the other."""
        own = _make_ring(self._ring_bytes)
        try:
            socket.send_fds(wire, [b"ring"], [own])
            to_other = _mapped(own)
        finally:
            os.close(own)
        return RingCarrier(wire, to_other, _received_ring(wire), dead_after_s)


class RingCarrier:
    """Headers through the socket, which is also what is slept on; rows through the rings."""

    part_bytes = 64 << 20  # there is one carrier only: few headers

    def __init__(
        self,
        wire: socket.socket,
        to_other: NDArray[np.uint8],
        from_other: NDArray[np.uint8],
        dead_after_s: float,
    ) -> None:
        self._wire = wire
        self._to_other, self._from_other = to_other, from_other
        self._patience_s = dead_after_s
        self._stop = np.zeros(1, np.uint32)
        set_patience(wire, dead_after_s)

    def send_part(self, header: bytes, data: BlockRows) -> None:
        try:
            self._wire.sendall(header)
        except BlockingIOError:
            raise LinkLost(f"the other side took nothing for {self._patience_s:g} s") from None
        ring, patience_s, stop = self._to_other, self._patience_s, self._stop
        put = native.put_rows(ring, data.arrays, data.blocks, 0, patience_s, stop)
        self._check(put, data.num_bytes, "took")

    def receive_header(self) -> bytes | None:
        return header_from(self._wire)

    def receive_rows(self, places: BlockRows) -> None:
        ring, patience_s, stop = self._from_other, self._patience_s, self._stop
        taken = native.take_rows(ring, places.arrays, places.blocks, 0, patience_s, stop)
        self._check(taken, places.num_bytes, "sent")

    def drop_rows(self, num_bytes: int) -> None:
        dropped = native.drop_rows(self._from_other, num_bytes, self._patience_s, self._stop)
        self._check(dropped, num_bytes, "sent")

    def _check(self, moved: int, wanted: int, what: str) -> None:
        if moved == _BROKEN:
            raise LinkLost("the other side has broken the ring of shared memory")
        if moved < wanted and self._stop[0]:
            raise LinkLost(GONE)
        if moved < wanted:
            raise LinkLost(f"the other side {what} nothing for {self._patience_s:g} s, amid rows")

    def hang_up(self) -> None:
        self._stop[0] = 1
        hang_up(self._wire)

    def close(self) -> None:
        self._wire.close()
        del self._to_other, self._from_other  # the memory goes with its last user


def _make_ring(num_bytes: int) -> int:
    ring = os.memfd_create("duetto-kv-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(ring, HEADER_BYTES + num_bytes)
    fcntl.fcntl(ring, fcntl.F_ADD_SEALS, _SEALS)
    return ring


def _received_ring(wire: socket.socket) -> NDArray[np.uint8]:
    """The other side's. One that could shrink would end this process."""
    said, rings, _, _ = socket.recv_fds(wire, 4, 1)
    try:
        if said != b"ring" or len(rings) != 1:
            raise LinkLost("the other side gave no ring of shared memory")
        size = os.fstat(rings[0]).st_size - HEADER_BYTES
        with suppress(OSError):
            seals = fcntl.fcntl(rings[0], fcntl.F_GET_SEALS)
            if seals & _SEALS == _SEALS and HEADER_BYTES <= size <= MAX_RING_BYTES:
                return _mapped(rings[0])
        raise LinkLost("the other side gave a ring that is not sealed, or of another size")
    finally:
        for ring in rings:
            os.close(ring)


def _mapped(ring: int) -> NDArray[np.uint8]:
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(ring, os.fstat(ring).st_size, flags), np.uint8)


_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if _SEALS_ARE_THERE else 0
