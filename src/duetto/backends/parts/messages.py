"""What the engine's process and its parts say to each other: frames of a few typed messages.

A frame is its length and msgpack. Both sides are one engine on one machine, over a socket that only
they have; frames are bounded and parsed strictly all the same. Knows no processes.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress
from struct import Struct
from threading import Lock
from typing import Any, Generic, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import IntArray, KVMoves, StepArrays
from duetto.program.dtype import KVDtype

MAX_FRAME_BYTES = 256 << 20
_LENGTH = Struct("<I")


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class _Order(_Message, frozen=True):
    order: int  # they count up


class StartPart(_Message, frozen=True):
    """The first one: what to load is the business of who starts processes."""

    spec: bytes


class AllocateKV(_Order, frozen=True):
    kv: int
    num_blocks: int
    block_size: int
    dtype: KVDtype


class FreeKV(_Order, frozen=True):
    kv: int


class RunStep(_Order, frozen=True):
    kv: int
    arrays: tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]  # of StepArrays


class MoveKV(_Order, frozen=True):
    kv: int
    arrays: tuple[bytes, bytes, bytes, bytes]  # of KVMoves


class ReadKV(_Order, frozen=True):
    kv: int
    layer: int
    slots: bytes


class ExportBlocks(_Order, frozen=True):
    kv: int
    blocks: list[int]
    num_tokens: list[int]


class ImportBlocks(_Order, frozen=True):
    kv: int
    blocks: list[int]
    data: bytes


PartOrder = AllocateKV | FreeKV | RunStep | MoveKV | ReadKV | ExportBlocks | ImportBlocks
ToPart = StartPart | PartOrder

# What became of an order: the exception that it raises in the engine's process.
Failure = Literal["config", "checkpoint", "memory", "value", "skipped", "lost", "other"]


class PartLoading(_Message, frozen=True):
    done: int
    total: int


class PartReady(_Message, frozen=True):
    weight_bytes: int
    notes: list[str]


class OrderDone(_Message, frozen=True):
    order: int
    data: bytes = b""  # of blocks, or of keys and values
    number: int = 0  # rows of logits, or bytes of a block


class OrderFailed(_Message, frozen=True):
    order: int
    failure: Failure
    text: str


FromPart = PartLoading | PartReady | OrderDone | OrderFailed

_Read = TypeVar("_Read")
_encoder = msgspec.msgpack.Encoder()


class PartChannel(Generic[_Read]):
    """One end of a socket between the engine and a part; reads messages of one union of types."""

    def __init__(self, sock: socket.socket, read: Any) -> None:
        self.socket = sock
        self._decoder: msgspec.msgpack.Decoder[_Read] = msgspec.msgpack.Decoder(read)
        self._turn = Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Raises OSError if the other side is gone, and ValueError for a frame that is too long."""
        data = _encoder.encode(message)
        if len(data) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(data)} bytes: at most {MAX_FRAME_BYTES}")
        with self._turn:
            self.socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> _Read:
        """The next message. Raises EOFError or OSError if the other side is gone, and ValueError
        (msgspec's errors are) for what is no message."""
        (length,) = _LENGTH.unpack(receive_exactly(self.socket, _LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {length} bytes: at most {MAX_FRAME_BYTES}")
        return self._decoder.decode(receive_exactly(self.socket, length))

    def close(self) -> None:
        """Both directions; whoever waits for a message is told."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def receive_exactly(sock: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError("the other side has closed")
        view = view[count:]
    return data


def as_bytes(arrays: Sequence[NDArray[Any]]) -> Any:
    return tuple(np.ascontiguousarray(array, np.int32).tobytes() for array in arrays)


def as_ints(data: bytes) -> IntArray:
    return np.frombuffer(data, np.int32)


def step_arrays_of(order: RunStep) -> StepArrays:
    step = StepArrays(*map(as_ints, order.arrays))
    num_runs, num_blocks = len(step.context_lens), len(step.block_tables)
    if num_runs == 0 or num_blocks % num_runs:
        raise ValueError(f"{num_blocks} blocks for {num_runs} runs: each must have as many")
    return step._replace(block_tables=step.block_tables.reshape(num_runs, -1))


def kv_moves_of(order: MoveKV) -> KVMoves:
    return KVMoves(*map(as_ints, order.arrays))
