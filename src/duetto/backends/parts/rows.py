"""Rows of numbers that go from one process to another in shared memory.

Memory is cut into places, one for each KV arena: an arena has one step under way at most, so
nobody writes a place that somebody still reads. Who reads hears from elsewhere that rows are there.
Places lie far apart in a file that has no pages but those that were written.
"""

import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np

from duetto.backends.backend import FloatArray

MAX_PLACES = 256
_PLACE_BYTES = 1 << 36
_LEAST_BYTES = 1 << 16


def make_rows_memory(name: str) -> int:
    """A descriptor."""
    descriptor = os.memfd_create(f"duetto-{name}")
    try:
        os.ftruncate(descriptor, MAX_PLACES * _PLACE_BYTES)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class RowsMemory:
    """One process's view of it, whose descriptor this is now. `widths` are those of the arrays that
    travel together."""

    def __init__(self, descriptor: int, widths: Sequence[int]) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._widths = tuple(widths)
        self._maps: dict[int, tuple[mmap.mmap, int]] = {}

    def write(self, place: int, arrays: Sequence[FloatArray]) -> int:
        """Returns how many rows there are."""
        num_rows = len(arrays[0])
        for view, array in zip(self.views(place, num_rows), arrays, strict=True):
            view[:] = array
        return num_rows

    def views(self, place: int, num_rows: int) -> list[FloatArray]:
        """What lies there, until it is written again: [num_rows, width] each."""
        memory = self._mapped(place, 4 * num_rows * sum(self._widths))
        found, start = [], 0
        for width in self._widths:
            flat = np.frombuffer(memory, np.float32, num_rows * width, start)
            found.append(flat.reshape(num_rows, width))
            start += flat.nbytes
        return found

    def forget(self, place: int) -> None:
        self._maps.pop(place, None)

    def _mapped(self, place: int, num_bytes: int) -> mmap.mmap:
        if not 0 <= place < MAX_PLACES or num_bytes > _PLACE_BYTES:
            raise ValueError(f"{num_bytes} bytes of rows at place {place}: there is no such room")
        memory, size = self._maps.get(place, (None, 0))
        if memory is None or size < num_bytes:
            size = max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
            memory = mmap.mmap(self._descriptor, size, offset=place * _PLACE_BYTES)
            self._maps[place] = memory, size
        return memory
