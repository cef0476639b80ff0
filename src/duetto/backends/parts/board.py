"""What each part has done, in memory that all see: nobody has to ask, nor to answer."""

import mmap
import os

import numpy as np
from numpy.typing import NDArray

_BYTES = 1 << 16
_PER_PART = 8  # numbers: a cache line each


def make_board() -> int:
    """A descriptor."""
    descriptor = os.memfd_create("duetto-board")
    os.ftruncate(descriptor, _BYTES)
    return descriptor


class Board:
    """A process's view of it. Each part writes its own line."""

    def __init__(self, descriptor: int) -> None:
        memory = mmap.mmap(descriptor, _BYTES)
        self._lines: NDArray[np.int64] = np.frombuffer(memory, np.int64).reshape(-1, _PER_PART)

    def done(self, part: int, order: int, busy_ns: int) -> None:
        """A part has finished an order, and computed for so long since it began."""
        self._lines[part, 1] += busy_ns
        self._lines[part, 0] = order

    def last_order(self, part: int) -> int:
        return int(self._lines[part, 0])

    def busy_s(self, part: int) -> float:
        return float(self._lines[part, 1]) / 1e9
