"""With which sizes attention is launched, and which it cannot take. Knows no step and no kernel."""

import math
from typing import NamedTuple

import torch

_PROGRAMS = 264  # two for each multiprocessor of an H100
_LOG2_E = math.log2(math.e)


class HeadShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None


class Exponents(NamedTuple):
    """What a product of query and key is multiplied with, before a tanh and after it, to be an
    exponent of 2."""

    inner: float  # 0: there is no tanh
    outer: float


class AttentionLaunch(NamedTuple):
    num_warps: int
    num_stages: int


def exponents(scale: float, softcap: float | None) -> Exponents:
    assert scale > 0, f"scale {scale}: maxima are taken of what is not scaled yet"
    if softcap is None:
        return Exponents(0.0, scale * _LOG2_E)
    return Exponents(2 * _LOG2_E * scale / softcap, softcap * _LOG2_E)


def num_shares(num_tiles: int, num_kv_heads: int, max_splits: int) -> int:
    """Programs that share a tile's splits out: fixed by the launch's own sizes, so that a graph is
    right for any context."""
    return max(1, min(max_splits, -(-_PROGRAMS // (num_tiles * num_kv_heads))))


def many_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Of a tile that one program walks."""
    if dtype == torch.float32:
        return 16
    return 128 if head_dim <= 128 else 64


def launch_of(rows: int, head_dim: int) -> AttentionLaunch:
    return AttentionLaunch(8 if rows >= 128 or (head_dim > 128 and rows >= 64) else 4, 2)
