"""Some columns of a quantized weight, out of the packed bytes of all of them.

A rank that has a part of a weight's columns (program/cut.py) must have the same numbers as the
whole weight, so rows are quantized whole and then cut. A scale belongs to a group of columns; where
a part begins within a group, its own groups are smaller, and several have one scale. What bytes
mean, csrc/kernels.h says: lines of 64 outputs by 4 (int8) or 8 (int4) columns, scales by group.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np

from duetto.backends.blocks import Bytes
from duetto.backends.cpu.formats import Format
from duetto.program.cut import Span

_TILE_ROWS = 64
_LINE_BYTES = 256
_LINE_COLUMNS = {"int8": 4, "int4": 8}
_MULTIPLE = 8  # of columns: what lines and groups of any format are made of


def cut_format(whole: Format, columns: Sequence[Span], k: int) -> Format | None:
    """The format of these columns of a weight that is k wide and quantized as `whole`. None: one
    of them begins or ends where packed bytes cannot be cut."""
    if any(span.end % _MULTIPLE and span.end != k for span in columns):
        return None
    borders = [span.start for span in columns] + [span.width for span in columns[:-1]]
    group = gcd(whole.group, *borders)
    return None if group % _MULTIPLE else Format(whole.kind, group)


def cut_lines(kind: str, columns: Sequence[Span], packed: Bytes, out: Bytes) -> None:
    """The packed numbers of some columns, from those of whole rows."""
    step = _LINE_COLUMNS[kind]
    lines = [
        np.arange(span.start, -(-span.end // _MULTIPLE) * _MULTIPLE, step) // step
        for span in columns
    ]
    _take(np.concatenate(lines), _LINE_BYTES, packed, out)


def cut_scales(
    whole: Format, part: Format, columns: Sequence[Span], packed: Bytes, out: Bytes
) -> None:
    """The scales of the part's groups, from those of the whole's."""
    starts = [np.arange(span.start, span.end, part.group) for span in columns]
    _take(np.concatenate(starts) // whole.group, 2 * _TILE_ROWS, packed, out)


def _take(places: np.ndarray, size: int, packed: Bytes, out: Bytes) -> None:
    """Runs of `size` bytes of each tile."""
    tiles = len(out) // (len(places) * size)
    out.reshape(tiles, len(places), size)[:] = packed.reshape(tiles, -1, size)[:, places]
