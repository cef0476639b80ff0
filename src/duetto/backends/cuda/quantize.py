"""Rows of a weight into its format, on the device that they are on.

int8 and int4 have the numbers and scales of the CPU's packing (csrc/pack.cpp): the same steps in
the same order, so a quantized model is the same model on both. Rows are independent. What is not
finite is quantized to something: it is refused by who reads a checkpoint.
"""

import torch
from torch import Tensor

from duetto.backends.cuda.tensors import Matrix

_TINY = 1e-30  # a group, or a row, that is smaller is zeros: its scale has no inverse
_LANES = 8  # in which the packing adds up a group's errors
_E4M3_LARGEST = 448.0
# Where the number farthest from 0 may go: beyond -8 or 7 it is clipped, for the others' good
_INT4_PLACES = (-7.0, -7.4, -7.7, -8.0, -8.4, -8.9, -9.5, 7.0, 7.5, 8.0)


def put_rows(rows: Tensor, matrix: Matrix, first_row: int) -> None:
    """Keep rows [n, K] of a weight as the matrix' format says, from `first_row` on."""
    data = matrix.data[first_row : first_row + len(rows)]
    if matrix.scales is None:
        data.copy_(rows, non_blocking=True)
        return
    scales = matrix.scales[first_row : first_row + len(rows)]
    if matrix.format.kind == "fp8":
        numbers, own = quantize_fp8(rows.float())
    else:
        groups = _in_groups(rows.float(), matrix.format.group)
        quantize = quantize_int8 if matrix.format.kind == "int8" else quantize_int4
        numbers, own = quantize(groups)
        numbers = numbers.flatten(1)[:, : data.shape[1]]
    data.copy_(numbers)
    scales.copy_(own)


def quantize_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[n, G, group] as int8, and scales [n, G]: bf16 numbers, chosen so that nothing is clipped."""
    largest = groups.abs().amax(-1)
    scales = _zero_if_tiny(_bf16_away_from_zero(_divided(largest, 127.0)), largest)
    return (groups * _inverse(scales)[..., None]).round().to(torch.int8), scales


def quantize_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[n, G, group / 2] bytes, and scales [n, G]: the bf16 numbers, of some that are tried, with
    the least sum of squared errors."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    best = _bf16(_divided(extreme, -8.0))  # stays if squares overflow
    least = torch.full_like(best, torch.inf)
    places = torch.tensor(_INT4_PLACES, device=groups.device)
    for i in range(len(_INT4_PLACES) + 1):  # then the best of them, refined
        wanted = extreme / places[i] if i < len(_INT4_PLACES) else _refitted(groups, best)
        scales = _bf16(wanted)
        wrong = groups - _int4_values(groups, scales) * scales[..., None]
        error = _sum(wrong * wrong)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best = torch.where(is_better, scales, best)
    best = _zero_if_tiny(best, extreme.abs())
    values = (_int4_values(groups, best) + 8).to(torch.uint8)
    low, high = values.chunk(2, dim=-1)
    return low | high << 4, best


def quantize_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, K] as e4m3, and a scale per row: the largest number becomes 448."""
    largest = rows.abs().amax(-1)
    scales = _zero_if_tiny(_divided(largest, _E4M3_LARGEST), largest)
    divisors = torch.where(scales == 0, torch.inf, scales)
    return (rows / divisors[:, None]).to(torch.float8_e4m3fn), scales


def _in_groups(rows: Tensor, group: int) -> Tensor:
    """[n, G, group], with zeros behind the last column."""
    missing = -rows.shape[1] % group
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.unflatten(1, (-1, group))


def _int4_values(groups: Tensor, scales: Tensor) -> Tensor:
    return (groups * _inverse(scales)[..., None]).round_().clamp_(-8, 7)


def _refitted(groups: Tensor, scales: Tensor) -> Tensor:
    """The scale that fits best the values that `scales` rounds to: sum(x q) / sum(q q)."""
    values = _int4_values(groups, scales)
    return _sum(groups * values) / _sum(values * values)


def _sum(groups: Tensor) -> Tensor:
    """Of each group, in the order of the packing: eight lanes, then across them."""
    steps = groups.unflatten(-1, (-1, _LANES)).unbind(-2)
    total = steps[0].clone()
    for step in steps[1:]:
        total += step
    v = total.unbind(-1)
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]))


def _divided(x: Tensor, divisor: float) -> Tensor:
    """By a tensor: a GPU multiplies by the inverse of a plain number, which rounds otherwise."""
    return x / torch.tensor(divisor, device=x.device)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, torch.ones_like(scales) / scales)


def _zero_if_tiny(scales: Tensor, largest: Tensor) -> Tensor:
    return torch.where(largest < _TINY, 0.0, scales)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _bf16_away_from_zero(x: Tensor) -> Tensor:
    """The bits of fp32, of which bf16 keeps the upper half."""
    return (x.view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)
