"""Rows of blocks copied: natively, or, where there is no native module, in Python (the slow twin).

Knows nothing of links.
"""

import errno
import socket
from collections.abc import Iterator

import numpy as np

from duetto.cluster.links.link import BlockRows

try:
    import duetto._native as native
except ImportError:  # no compiler when Duetto was installed
    native = None  # type: ignore[assignment]

HAS_NATIVE = native is not None and hasattr(native, "send_rows")
_MAX_SPANS = 1024  # of one call of the system (IOV_MAX of Linux)


def check_rows(rows: BlockRows) -> None:
    """Raises ValueError for blocks that are not in every array."""
    num_blocks = min([len(array) for array in rows.arrays], default=0)
    if len(rows.blocks) and not 0 <= rows.blocks.min() <= rows.blocks.max() < num_blocks:
        raise ValueError(f"rows: a block that is not in an arena of {num_blocks}")


def spans_of(rows: BlockRows, start: int = 0) -> Iterator[memoryview]:
    """Their bytes from `start` on, as pieces of memory in order."""
    check_rows(rows)
    block, offset = divmod(start, rows.block_bytes)
    for number in rows.blocks[block:]:
        for array in rows.arrays:
            if offset < array.shape[1]:
                yield memoryview(array[number])[offset:]
            offset = max(0, offset - array.shape[1])


def copy_block_rows(source: BlockRows, to: BlockRows) -> None:
    """Raises ValueError if they are not equally many bytes."""
    if native is not None and HAS_NATIVE:
        native.copy_rows(source.arrays, source.blocks, to.arrays, to.blocks)
    elif source.num_bytes != to.num_bytes:
        raise ValueError(f"rows: {source.num_bytes} bytes do not fit into {to.num_bytes}")
    else:
        flat = np.frombuffer(b"".join(spans_of(source)), np.uint8)
        start = 0
        for span in spans_of(to):
            span[:] = flat[start : start + len(span)].data
            start += len(span)


def send_some(wire: socket.socket, rows: BlockRows, start: int, limit: int) -> int:
    """One call of the system: how many bytes went. Raises OSError."""
    if native is not None and HAS_NATIVE:
        own = (wire.fileno(), rows.arrays, rows.blocks, start, limit)
        while (sent := native.send_rows(*own)) == -errno.EINTR:
            pass
        return _checked(sent)
    return wire.sendmsg(_some(rows, start, limit))


def receive_some(wire: socket.socket, rows: BlockRows, start: int, limit: int) -> int:
    """One call of the system: how many bytes came, 0 at the end. Raises OSError."""
    if native is not None and HAS_NATIVE:
        own = (wire.fileno(), rows.arrays, rows.blocks, start, limit)
        while (came := native.receive_rows(*own)) == -errno.EINTR:
            pass
        return _checked(came)
    return wire.recvmsg_into(_some(rows, start, limit))[0]


def _some(rows: BlockRows, start: int, limit: int) -> list[memoryview]:
    found: list[memoryview] = []
    for span in spans_of(rows, start):
        if limit <= 0 or len(found) == _MAX_SPANS:
            break
        found.append(span[:limit])
        limit -= len(span)
    return found


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, errno.errorcode.get(-result, "error"))
    return result
