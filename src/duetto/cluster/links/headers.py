"""What crosses a link beside the bytes of rows: headers of fixed sizes, strictly parsed.

On the control channel: frames, and heartbeats. A frame says how many parts of rows had been sent by
each carrier before it, and a part how many frames: so each side puts them back in order.
"""

from struct import Struct
from typing import NamedTuple

from duetto.cluster.links.link import MAX_FRAME_BYTES, LinkLost, RowsSent

MAX_CARRIERS = 16
MAX_BLOCKS = 1 << 24  # of one part
MAX_PART_BYTES = 1 << 40
_FRAME, _HEARTBEAT = 1, 2
_CONTROL = Struct("<BBHI")  # kind, carriers, 0, bytes of the frame
_COUNT = Struct("<Q")
_PART = Struct("<4sIQIIIIQQ")  # magic, 0, transfer, layer, first, blocks, 0, frames, bytes
_MAGIC = b"rows"
PART_BYTES = _PART.size
HEARTBEAT = _CONTROL.pack(_HEARTBEAT, 0, 0, 0)


class SentFrame(NamedTuple):
    """A frame, and how many parts each carrier had brought before it."""

    counts: tuple[int, ...]
    frame: bytes


class SentPart(NamedTuple):
    """What comes next on a carrier."""

    rows: RowsSent
    num_frames: int  # sent before it
    num_bytes: int


def frame_message(counts: tuple[int, ...], frame: bytes) -> bytes:
    head = _CONTROL.pack(_FRAME, len(counts), 0, len(frame))
    return head + b"".join(map(_COUNT.pack, counts)) + frame


def part_header(part: SentPart) -> bytes:
    rows = part.rows
    return _PART.pack(
        *(_MAGIC, 0, rows.transfer_id, rows.layer, rows.first, rows.num_blocks, 0),
        *(part.num_frames, part.num_bytes),
    )


def part_in_header(header: bytes) -> SentPart:
    """Raises LinkLost for what is no header."""
    magic, zero, transfer, layer, first, num_blocks, zero2, num_frames, size = _PART.unpack(header)
    if magic != _MAGIC or zero or zero2:
        raise LinkLost("the other side sent something else than rows")
    if not 1 <= num_blocks <= MAX_BLOCKS or not num_blocks <= size <= MAX_PART_BYTES:
        raise LinkLost(f"the other side sent {num_blocks} blocks of together {size} bytes")
    return SentPart(RowsSent(transfer, layer, first, num_blocks), num_frames, size)


class ControlParser:
    """Bytes of the control channel, as they come, to frames."""

    def __init__(self, num_carriers: int) -> None:
        self._num_carriers = num_carriers
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[SentFrame]:
        """Raises LinkLost for what is none."""
        self._buffer += data
        found: list[SentFrame] = []
        while len(self._buffer) >= _CONTROL.size:
            kind, carriers, zero, length = _CONTROL.unpack_from(self._buffer)
            if kind == _HEARTBEAT and not (carriers or zero or length):
                del self._buffer[: _CONTROL.size]
                continue
            if kind != _FRAME or carriers != self._num_carriers or zero:
                raise LinkLost("the other side sent something else than a frame")
            if length > MAX_FRAME_BYTES:
                raise LinkLost(
                    f"the other side sent a frame of {length} bytes; at most {MAX_FRAME_BYTES} "
                    f"are accepted"
                )
            start = _CONTROL.size + carriers * _COUNT.size
            if len(self._buffer) < start + length:
                break
            counts = [
                _COUNT.unpack_from(self._buffer, _CONTROL.size + i * _COUNT.size)[0]
                for i in range(carriers)
            ]
            found.append(SentFrame(tuple(counts), bytes(self._buffer[start : start + length])))
            del self._buffer[: start + length]
        return found
