"""The KV arena of the reference backend: one array of keys and one of values per layer."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes  # makes "bfloat16" a dtype that numpy knows by name, too
import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, IntArray
from duetto.backends.blocks import Bytes
from duetto.program.dtype import KVDtype
from duetto.program.program import KVSpec

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# The largest number of each format that has scales; int8's -128 is not used: it is symmetric.
_LARGEST = {np.dtype(np.int8): np.float32(127), _FP8: np.float32(448)}


@dataclass(frozen=True, slots=True)
class HeadRows:
    """One layer's keys, or values: a row of head_dim numbers per token and KV head.

    In int8 and fp8 (e4m3) a row has an fp32 scale of its own, its largest magnitude / 127 or 448,
    so that a row never depends on another, and is never written again.
    """

    numbers: NDArray[Any]  # [num_blocks, block_size, kv_heads, head_dim]
    scales: FloatArray | None  # [num_blocks, block_size, kv_heads]; int8 and fp8 only

    def write(self, slots: IntArray, rows: FloatArray) -> None:
        """Store rows of [T, kv_heads * head_dim] in `slots`, rounded to the arena's dtype."""
        by_slot = _by_slot(self.numbers)
        _check_inside(slots, len(by_slot))
        heads = rows.reshape(len(slots), *by_slot.shape[1:])
        if self.scales is None:
            by_slot[slots] = heads
        else:
            by_slot[slots], _by_slot(self.scales)[slots] = quantize_rows(heads, by_slot.dtype)

    def at(self, slots: IntArray) -> FloatArray:
        """The rows in these slots, [len(slots), kv_heads, head_dim]."""
        numbers = _by_slot(self.numbers)[slots].astype(np.float32)
        if self.scales is not None:
            numbers *= _by_slot(self.scales)[slots][..., None]
        return numbers

    def bytes_of_blocks(self) -> list[Bytes]:
        """All that is stored, of each block, [num_blocks, bytes] each; the memory itself."""
        stored = [a for a in (self.numbers, self.scales) if a is not None]
        return [a.reshape(len(a), -1).view(np.uint8) for a in stored if a.size]

    def copy(self, from_slots: IntArray, to_slots: IntArray) -> None:
        """As they are stored."""
        for stored in (self.numbers, self.scales):
            if stored is not None:
                _by_slot(stored)[to_slots] = _by_slot(stored)[from_slots]

    def read(self, blocks: IntArray, num_tokens: int) -> FloatArray:
        """The rows of positions 0 ... num_tokens, [num_tokens, kv_heads, head_dim]."""
        numbers = _gather(self.numbers, blocks, num_tokens).astype(np.float32)
        if self.scales is not None:
            numbers *= _gather(self.scales, blocks, num_tokens)[..., None]
        return numbers


def quantize_rows(rows: FloatArray, dtype: np.dtype[Any]) -> tuple[NDArray[Any], FloatArray]:
    """[..., head_dim] -> numbers of the same shape, and scales [...]; a row of zeros has scale 0.
    Both formats round to the nearest, and to the even one of two."""
    scales = np.abs(rows).max(axis=-1) / _LARGEST[dtype]
    divisors = np.where(scales == 0, np.float32(1), scales)
    with np.errstate(invalid="ignore"):  # a row that is not finite has a scale that says so
        steps = rows / divisors[..., None]
        if dtype == np.int8:
            steps = np.rint(steps)
        return steps.astype(dtype), scales


@dataclass(frozen=True, slots=True)
class KVArena:
    keys: tuple[HeadRows, ...]  # per layer
    values: tuple[HeadRows, ...]

    def write(self, layer: int, slots: IntArray, keys: FloatArray, values: FloatArray) -> None:
        """Store rows of [T, kv_heads * head_dim] in `slots`, rounded to the arena's dtype."""
        self.keys[layer].write(slots, keys)
        self.values[layer].write(slots, values)

    def read(self, layer: int, blocks: IntArray, num_tokens: int) -> tuple[FloatArray, FloatArray]:
        """The keys and values of positions 0 ... num_tokens, [num_tokens, kv_heads, head_dim]."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.read(blocks, num_tokens), values.read(blocks, num_tokens)

    @property
    def block_size(self) -> int:
        return int(self.keys[0].numbers.shape[1])

    def rows_of_blocks(self) -> list[Bytes]:
        """All that is stored, layer by layer, as the bytes of each block, token by token: arrays
        of [num_blocks, bytes]. So stages of layers have the bytes of the whole, one after the
        other."""
        return [array for layer in self.rows_by_layer() for array in layer]

    def rows_by_layer(self) -> list[list[Bytes]]:
        """The same arrays, those of each layer together."""
        layers = zip(self.keys, self.values, strict=True)
        return [[*k.bytes_of_blocks(), *v.bytes_of_blocks()] for k, v in layers]


def _by_slot(arena: NDArray[Any]) -> NDArray[Any]:
    num_blocks, block_size, *shape = arena.shape
    return arena.reshape(num_blocks * block_size, *shape)


def _gather(arena: NDArray[Any], blocks: IntArray, num_tokens: int) -> NDArray[Any]:
    block_size = arena.shape[1]
    used = blocks[: -(-num_tokens // block_size)]
    _check_inside(used, len(arena))
    return arena[used].reshape(len(used) * block_size, *arena.shape[2:])[:num_tokens]


def _check_inside(places: IntArray, count: int) -> None:
    """Slots or blocks of the arena. A negative one would count from its end."""
    assert places.min() >= 0 and places.max() < count, "a slot or a block outside the arena"


def allocate(
    layers: tuple[KVSpec, ...], num_blocks: int, block_size: int, dtype: KVDtype
) -> KVArena:
    def empty(kv: KVSpec) -> HeadRows:
        shape = (num_blocks, block_size, kv.num_kv_heads)
        stored = _FP8 if dtype == "fp8" else np.dtype(dtype)
        scales = np.zeros(shape, np.float32) if stored in _LARGEST else None
        return HeadRows(np.zeros((*shape, kv.head_dim), stored), scales)

    return KVArena(tuple(map(empty, layers)), tuple(map(empty, layers)))
