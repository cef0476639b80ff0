"""Which tiles a projection is computed in: how many outputs, tokens and inputs at a time.

Chosen by format and number of rows from tables, never by trying at run time. Tiles change no bit
of a result (backends/cuda/library.py checks that at load). Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from triton import knobs

from duetto.backends.cuda.formats import GpuFormatName

UNIT: Mapping[GpuFormatName, int] = {"int8": 128, "int4": 64}  # inputs that share a scale
_BYTES: Mapping[GpuFormatName, float] = {"float32": 4, "int8": 1, "fp8": 1, "int4": 0.5}
_RESERVED = 4 << 10  # of a program's shared memory, for what is not a tile


@dataclass(frozen=True, slots=True)
class LinearTile:
    """[outputs, inputs] of the weight and [inputs, tokens] of x, `stages` of them on their way."""

    outputs: int
    tokens: int
    inputs: int
    warps: int
    stages: int

    def stage_bytes(self, kind: GpuFormatName, gated: bool) -> int:
        weight = _BYTES.get(kind, 2) * self.outputs * (2 if gated else 1)
        return int(self.inputs * (weight + (4 if kind == "float32" else 2) * self.tokens))


# By the number of rows up to which a tile is used, ascending; the last serves any number. 2-byte
# tiles are those that an H100 measured (docs/benchmarks/gpu.md), others are made like them.
_Tiles = Mapping[int, LinearTile]
_LARGEST = 1 << 30
_HALF: _Tiles = {
    16: LinearTile(64, 16, 128, 4, 5),
    32: LinearTile(64, 32, 128, 4, 4),
    64: LinearTile(64, 64, 128, 4, 4),
    512: LinearTile(128, 128, 64, 8, 4),
    _LARGEST: LinearTile(128, 256, 64, 8, 3),
}
_HALF_GATED: _Tiles = {
    16: LinearTile(64, 16, 128, 4, 5),
    32: LinearTile(64, 32, 128, 4, 4),
    64: LinearTile(64, 64, 128, 4, 4),
    _LARGEST: LinearTile(128, 128, 64, 8, 3),
}
_FLOAT: _Tiles = {
    16: LinearTile(32, 16, 64, 4, 3),
    _LARGEST: LinearTile(64, 64, 32, 8, 3),
}
_BYTE: _Tiles = {
    16: LinearTile(64, 16, 256, 4, 4),
    32: LinearTile(64, 32, 128, 4, 5),
    64: LinearTile(64, 64, 128, 4, 4),
    _LARGEST: LinearTile(128, 128, 128, 8, 3),
}
_BYTE_GATED: _Tiles = {
    16: LinearTile(64, 16, 256, 4, 4),
    32: LinearTile(64, 32, 128, 4, 5),
    64: LinearTile(64, 64, 128, 4, 4),
    _LARGEST: LinearTile(64, 128, 128, 8, 3),
}
_NIBBLE: _Tiles = {
    16: LinearTile(64, 16, 256, 4, 5),
    32: LinearTile(64, 32, 128, 4, 5),
    64: LinearTile(64, 64, 128, 4, 5),
    _LARGEST: LinearTile(128, 128, 64, 8, 4),
}
_NIBBLE_GATED: _Tiles = {
    16: LinearTile(64, 16, 256, 4, 5),
    32: LinearTile(64, 32, 128, 4, 5),
    64: LinearTile(64, 64, 128, 4, 5),
    _LARGEST: LinearTile(64, 128, 64, 8, 4),
}
_TABLES: Mapping[GpuFormatName, tuple[_Tiles, _Tiles]] = {
    "float32": (_FLOAT, _FLOAT),
    "float16": (_HALF, _HALF_GATED),
    "bfloat16": (_HALF, _HALF_GATED),
    "int8": (_BYTE, _BYTE_GATED),
    "fp8": (_BYTE, _BYTE_GATED),
    "int4": (_NIBBLE, _NIBBLE_GATED),
}
# The interpreter's product adds in an order that may depend on a tile's shape, and an operation
# costs it the same for any size: one tile for all.
_INTERPRETED: _Tiles = {_LARGEST: LinearTile(64, 16, 128, 1, 1)}


def is_interpreted() -> bool:
    return bool(knobs.runtime.interpret)


def linear_tiles(kind: GpuFormatName, gated: bool, shared_bytes: int) -> _Tiles:
    """All tiles of a format, by the number of rows up to which each is used, with as many stages as
    `shared_bytes` of shared memory take."""
    if is_interpreted():
        return _INTERPRETED
    tiles = _TABLES[kind][gated]
    return {rows: _fitted(tile, kind, gated, shared_bytes) for rows, tile in tiles.items()}


def linear_tile(kind: GpuFormatName, gated: bool, num_rows: int, shared_bytes: int) -> LinearTile:
    tiles = linear_tiles(kind, gated, shared_bytes)
    return tiles[min(most for most in tiles if most >= num_rows)]


def byte_tile(gated: bool, num_rows: int, shared_bytes: int) -> LinearTile:
    """Of a product of int8 by int8: a group at a time, whose sums and scales take registers too."""
    tile = linear_tile("int8", gated, num_rows, shared_bytes)
    return replace(tile, outputs=64, inputs=UNIT["int8"])


def _fitted(tile: LinearTile, kind: GpuFormatName, gated: bool, shared_bytes: int) -> LinearTile:
    """With fewer stages, or, if they are then too few to hide the memory's latency, smaller."""
    least = max(64, UNIT.get(kind, 0))
    while True:
        stages = (shared_bytes - _RESERVED) // tile.stage_bytes(kind, gated)
        if stages >= min(3, tile.stages) or max(tile.outputs, tile.tokens) == 16:
            return replace(tile, stages=min(tile.stages, stages))
        if tile.inputs > least:
            tile = replace(tile, inputs=tile.inputs // 2)
        elif tile.tokens > 64:
            tile = replace(tile, tokens=tile.tokens // 2)
        else:
            tile = replace(tile, outputs=tile.outputs // 2)
