"""Blocks of a KV arena as bytes, as they are stored: what leaves the arena and comes back is equal.

An arena is some arrays of one row for each block, of layers, keys or scales; a block is its rows,
one after the other. Knows no layout within a row.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def copy_out(arrays: Sequence[Bytes], blocks: Sequence[int], out: Bytes) -> None:
    """From arrays of [num_blocks, bytes] to `out`, [len(blocks), bytes of a block]."""
    _check(arrays, blocks, out)
    start = 0
    for array in arrays:
        end = start + array.shape[1]
        for row, block in enumerate(blocks):
            out[row, start:end] = array[block]
        start = end


def copy_in(arrays: Sequence[Bytes], blocks: Sequence[int], data: Bytes) -> None:
    """The other way."""
    _check(arrays, blocks, data)
    assert len(set(blocks)) == len(blocks), "a block is written twice"
    start = 0
    for array in arrays:
        end = start + array.shape[1]
        for row, block in enumerate(blocks):
            array[block] = data[row, start:end]
        start = end


def _check(arrays: Sequence[Bytes], blocks: Sequence[int], data: Bytes) -> None:
    block_bytes = sum([array.shape[1] for array in arrays])
    assert data.shape == (len(blocks), block_bytes), f"{data.shape}: not these blocks' bytes"
    num_blocks = min([len(array) for array in arrays])
    assert all(0 <= block < num_blocks for block in blocks), "a block outside the arena"
