"""The seam of KV links: a connection between two engines that moves frames and rows of blocks.

A link knows bytes. It does not know what a frame says, which request a transfer is for, nor what a
row means. Shared memory and TCP are two links; NIXL or UCX would be others: whatever brings rows to
the places that `LinkUser.places` names, and frames in the order in which they were sent.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

BlockRow = NDArray[np.uint8]  # of one block: contiguous bytes of an arena


class RowsSent(NamedTuple):
    """Which rows of a transfer: of one layer, some of its blocks in order."""

    transfer_id: int
    layer: int
    first: int  # of the transfer's blocks
    num_blocks: int


class LinkLost(Exception):
    """The other side is gone, or does not answer; the message says how it was seen."""


class LinkUser(Protocol):
    """Who uses one end. Called on the link's own thread; must not block."""

    def received(self, frame: bytes) -> None:
        """A frame, after all rows that were sent before it."""
        ...

    def places(self, rows: RowsSent) -> Sequence[BlockRow] | None:
        """Where rows are to be written: the arrays of all blocks in order, each block's one after
        the other; None if nobody wants them any more: they are read and thrown away. What is
        given stays writable until `arrived` or `lost`."""
        ...

    def arrived(self, rows: RowsSent) -> None:
        """They are written: the link touches their places no more."""
        ...

    def lost(self, reason: str) -> None:
        """Nothing comes any more, and nothing is being written. Told once."""
        ...


class LinkEnd(Protocol):
    """One end of a connection. Any thread may call; calls of one thread stay in order."""

    def send(self, frame: bytes) -> None:
        """Raises LinkLost."""
        ...

    def send_rows(self, rows: RowsSent, data: Sequence[BlockRow]) -> None:
        """Send blocks' bytes, each block's arrays one after the other; when it returns the memory
        may be written again. Raises LinkLost."""
        ...

    def close(self) -> None:
        """Afterwards the link touches no place. Safe to call twice."""
        ...
