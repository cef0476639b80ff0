"""Keys turned for other positions: what of it is the same in every backend.

The angle of a position is rounded to fp32 (RopeSpec), so the angle of a turn is the difference of
two such angles, in double precision. YaRN's factor is in the key already: a turn has none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, IntArray, KVMoves
from duetto.program.ops import RopeSpec


class Turn(NamedTuple):
    """The rotation of each token's keys, of one RopeSpec."""

    cos: FloatArray  # [N, rotary_dim / 2]
    sin: FloatArray


def turns(rotations: Sequence[RopeSpec | None], moves: KVMoves) -> list[Turn | None]:
    """By layer; layers that are turned alike share the arrays."""
    made: dict[RopeSpec, Turn] = {}
    for spec in rotations:
        if spec is not None and spec not in made:
            angles = _angles(spec, moves.to_positions) - _angles(spec, moves.from_positions)
            cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            made[spec] = Turn(cos, sin)
    return [None if spec is None else made[spec] for spec in rotations]


def _angles(spec: RopeSpec, positions: IntArray) -> NDArray[np.float64]:
    inv_freq = np.array(spec.inv_freq, np.float32)
    return (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)


def turned(heads: FloatArray, turn: Turn | None) -> FloatArray:
    """Keys [N, kv_heads, head_dim], each turned in half-split pairs; columns beyond stay."""
    if turn is None:
        return heads
    half = turn.cos.shape[1]
    cos, sin = turn.cos[:, None, :], turn.sin[:, None, :]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    out = heads.copy()
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    return out
