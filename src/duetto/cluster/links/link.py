"""The seam of KV links: a connection between two engines that moves frames and rows of blocks.

A link knows bytes. It does not know what a frame says, which request a transfer is for, nor what a
row means. Shared memory and TCP are two links; NIXL or UCX would be others: whatever brings rows to
the places that `LinkUser.places` names, and frames in the order in which they were sent.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

ArenaRows = NDArray[np.uint8]  # [num_blocks, bytes]: of all blocks, contiguous


MAX_FRAME_BYTES = 1 << 20


class RowsSent(NamedTuple):
    """Which rows of a transfer: of one layer, some of its blocks in order."""

    transfer_id: int  # 0 ... 2^64 - 1
    layer: int  # 0 ... 2^32 - 1, as are all of these
    first: int  # of the transfer's blocks
    num_blocks: int


class BlockRows(NamedTuple):
    """Rows of an arena, where they lie: some blocks in order, of each the rows in all arrays, one
    after the other. What `Backend.block_rows(kv)[layer]` gives, and which blocks of it."""

    arrays: Sequence[ArenaRows]
    blocks: NDArray[np.int32]

    @property
    def block_bytes(self) -> int:
        return sum([array.shape[1] for array in self.arrays])

    @property
    def num_bytes(self) -> int:
        return len(self.blocks) * self.block_bytes

    def part(self, first: int, num_blocks: int) -> "BlockRows":
        """Some of the blocks."""
        return BlockRows(self.arrays, self.blocks[first : first + num_blocks])


class LinkLost(Exception):
    """The other side is gone, or does not answer; the message says how it was seen."""


class LinkUser(Protocol):
    """Who uses one end. Called on the link's own threads, one call at a time; must not block. May
    call `send` and `close` of the link, but not `send_rows`."""

    def received(self, frame: bytes) -> None:
        """A frame, after all rows that were sent before it."""
        ...

    def places(self, rows: RowsSent) -> BlockRows | None:
        """Where rows are to be written; None if nobody wants them any more: they are read and
        thrown away. `rows` is what the other side says, and may be anything. What is given stays
        writable until `arrived` or `lost`, and is `rows.num_blocks` blocks. Rows that were sent by
        one call may come as several parts, in any order, each asked for and told."""
        ...

    def arrived(self, rows: RowsSent) -> None:
        """They are written: the link touches their places no more. Not told of rows that had no
        places."""
        ...

    def lost(self, reason: str) -> None:
        """Nothing comes any more, and nothing is being written. Told once, unless this side has
        closed the link."""
        ...


class LinkEnd(Protocol):
    """One end of a connection. Any thread may call; calls of one thread stay in order."""

    def send(self, frame: bytes) -> None:
        """At most MAX_FRAME_BYTES. Raises LinkLost."""
        ...

    def send_rows(self, rows: RowsSent, data: BlockRows) -> None:
        """Send `rows.num_blocks` blocks; when it returns the memory may be written again. Blocks
        while the other side is behind, for `dead_after_s` at most. Raises LinkLost."""
        ...

    def close(self) -> None:
        """Afterwards the link touches no place, and tells nothing. Safe to call twice."""
        ...
