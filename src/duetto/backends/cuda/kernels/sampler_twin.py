"""The slow twin of the sampler's kernels in plain torch. Knows no chunks."""

import torch
from torch import Tensor

from duetto.backends.cuda.kernels.sampler import SamplerScratch, SampleTensors


def sample_in_torch(
    logits: Tensor, rows: SampleTensors, scratch: SamplerScratch, out: Tensor
) -> None:
    """The slow twin of `sample`, in the order of runner/candidates.py."""
    del scratch  # it needs none
    each = zip(logits.unbind(0), *[tensor.tolist() for tensor in rows], strict=False)
    for place, (row, *params) in enumerate(each):
        out[place] = _token_in_torch(row, *params)


def _token_in_torch(
    row: Tensor, temperature: float, key: int, top_k: int, top_p: float, min_gap: float
) -> int:
    first = float(row.max())  # NaN if there is one
    if not abs(first) < float("inf"):
        return -1
    order = torch.sort(-row, stable=True).indices  # equal ones by id
    if temperature == 0.0:
        return int(order[0])
    if 0 < top_k < len(row):
        order = order[:top_k]
    order = order[row[order].double() >= first + min_gap]
    gaps = row[order].double() - first
    if top_p < 1.0:
        inverse = min(1.0 / temperature, 1.7976931348623157e308)
        weights = _weights_in_torch(gaps * inverse)
        ahead = torch.cumsum(weights, 0) - weights
        order = order[ahead.double() < top_p * float(weights.sum())]
        gaps = gaps[: len(order)]
    u = (_hash_in_torch(order, key).double() + 0.5) * 2.0**-32
    scores = gaps / temperature - _ln_in_torch(-_ln_in_torch(u))
    return int(order[scores == scores.max()].min())


def _weights_in_torch(gaps: Tensor) -> Tensor:
    gaps = gaps.clamp(min=-64.0)
    n = torch.round(gaps * 1.4426950408889634)
    r = gaps - n * 0.6931471805599453
    series = torch.full_like(r, 1.0 / 3628800)
    for divisor in (362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1):
        series = series * r
        series = series + 1.0 / divisor
    scale = ((n.to(torch.int64) + 1023 + 40) << 52).view(torch.float64)
    return torch.round(series * scale).to(torch.int64)


def _hash_in_torch(ids: Tensor, key: int) -> Tensor:
    """In int64, of which only the lower half is kept."""
    x = ids ^ (key & 0xFFFFFFFF)
    for half in (key >> 32 & 0xFFFFFFFF, 0):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        x = x ^ (x >> 16) ^ half
    return x


def _ln_in_torch(x: Tensor) -> Tensor:
    root = 0x3FE6A09E667F3BCD
    bits = x.view(torch.int64) - root
    exponent = (bits >> 52).double()
    m = ((bits & 0xFFFFFFFFFFFFF) + root).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = torch.full_like(z, 1.0 / 21)
    for odd in range(19, 0, -2):
        p = p * z
        p = p + 1.0 / odd
    return exponent * 0.6931471805599453 + (2.0 * s) * p
