"""The KV arena of the reference backend: one array of keys and one of values per layer."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  makes "bfloat16" a dtype that numpy knows by name
import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, IntArray
from duetto.program.dtype import Dtype
from duetto.program.program import KVSpec


@dataclass(frozen=True, slots=True)
class KVArena:
    keys: tuple[NDArray[Any], ...]  # per layer [num_blocks, block_size, kv_heads, head_dim]
    values: tuple[NDArray[Any], ...]

    def write(self, layer: int, slots: IntArray, keys: FloatArray, values: FloatArray) -> None:
        """Store rows of [T, kv_heads * head_dim] in `slots`, rounded to the arena's dtype."""
        for arena, rows in ((self.keys[layer], keys), (self.values[layer], values)):
            num_blocks, block_size, *head_shape = arena.shape
            by_slot = arena.reshape(num_blocks * block_size, *head_shape)
            by_slot[slots] = rows.reshape(len(slots), *head_shape)

    def read(self, layer: int, blocks: IntArray, num_tokens: int) -> tuple[FloatArray, FloatArray]:
        """The keys and values of positions 0 ... num_tokens, [num_tokens, kv_heads, head_dim]."""
        return (
            _gather(self.keys[layer], blocks, num_tokens),
            _gather(self.values[layer], blocks, num_tokens),
        )


def _gather(arena: NDArray[Any], blocks: IntArray, num_tokens: int) -> FloatArray:
    block_size = arena.shape[1]
    used = blocks[: -(-num_tokens // block_size)]
    rows = arena[used].reshape(len(used) * block_size, *arena.shape[2:])
    return rows[:num_tokens].astype(np.float32)


def allocate(layers: tuple[KVSpec, ...], num_blocks: int, block_size: int, dtype: Dtype) -> KVArena:
    def zeros() -> tuple[NDArray[Any], ...]:
        return tuple(
            np.zeros((num_blocks, block_size, kv.num_kv_heads, kv.head_dim), dtype) for kv in layers
        )

    return KVArena(zeros(), zeros())
