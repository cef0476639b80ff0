"""With which sizes attention is launched, and which it cannot take. Knows no step and no kernel."""

import math
from functools import cache
from typing import NamedTuple

import torch

from duetto.backends.cuda.sizes import FEW_ROWS

_HOPPER = 90
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


def many_rows(head_dim: int, dtype: torch.dtype, capability: int) -> int:
    """Of a tile that one program walks. Hopper's instruction (compute capability 90) takes 64 rows
    of four warps at a time; elsewhere so many sums are more than the registers hold."""
    if dtype == torch.float32:
        return FEW_ROWS
    rows = 64 if head_dim <= 128 else 32
    return 2 * rows if capability == _HOPPER else rows


def launch_of(rows: int, head_dim: int) -> AttentionLaunch:
    """What spills no register within a loop, or the fewest; the table in docs/benchmarks tells."""
    if rows == FEW_ROWS:
        return AttentionLaunch(4 if head_dim <= 128 else 8, 2)
    is_hoppers = rows * max(128, head_dim) >= 128 * 128
    return AttentionLaunch(8, 3 if is_hoppers else 2)


@cache
def capability_of(device: torch.device) -> int:
    """As 90; of the CPU's interpreter, that too."""
    if device.type != "cuda":
        return _HOPPER
    major, minor = torch.cuda.get_device_capability(device)
    return int(major * 10 + minor)
