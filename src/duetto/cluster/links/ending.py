"""What every end of a link has: it is open, or has ended once, for one reason; and its user is told
one thing at a time, and nothing after the end but `lost`."""

from collections.abc import Callable
from threading import Lock
from typing import TypeVar

import numpy as np

from duetto.cluster.links.link import BlockRows, LinkLost, LinkUser, RowsSent

_T = TypeVar("_T")
CLOSED_HERE = "the link was closed on this side"


class EndOfLink:
    """The state of one end. Any thread may call."""

    def __init__(self) -> None:
        self.user: LinkUser | None = None
        self._telling = Lock()
        self._changing = Lock()
        self._is_closed = False
        self._is_told = False
        self.reason: str | None = None  # why nothing goes any more
        self.stop = np.zeros(1, np.uint32)  # 1 once it has ended: native code looks at it

    def check(self) -> None:
        """Raises LinkLost once it has ended."""
        if self.reason is not None:
            raise LinkLost(self.reason)

    @property
    def is_over(self) -> bool:
        return self.reason is not None

    def end(self, reason: str, *, is_closed: bool = False) -> None:
        """The first reason is the one that is told; a user who closes is told none."""
        with self._changing:
            self._is_closed |= is_closed
            self.reason = self.reason or reason
            self.stop[0] = 1

    def received(self, frame: bytes) -> None:
        self._tell(lambda user: user.received(frame))

    def places(self, rows: RowsSent, num_bytes: int) -> BlockRows | None:
        """Where `num_bytes` are to be written. Raises LinkLost if they cannot be those rows."""
        found = self._tell(lambda user: user.places(rows))
        if found is not None and (
            len(found.blocks) != rows.num_blocks or found.num_bytes != num_bytes
        ):
            raise LinkLost(
                f"the other side sent {num_bytes} bytes as {rows.num_blocks} blocks, and here "
                f"{len(found.blocks)} blocks of {found.block_bytes} bytes are wanted"
            )
        return found

    def arrived(self, rows: RowsSent) -> None:
        self._tell(lambda user: user.arrived(rows))

    def tell_lost(self) -> None:
        """Once all that could write has ended."""
        with self._telling:
            if self.user is not None and not (self._is_told or self._is_closed):
                self._is_told = True
                self.user.lost(self.reason or "the link ended")

    def _tell(self, call: Callable[[LinkUser], _T]) -> _T | None:
        with self._telling:
            return None if self.user is None or self.is_over else call(self.user)
