"""KV arenas."""

import torch
from torch import Tensor

from duetto.backends.cuda.tensors import LayerKV

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_heads(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[..., head_dim] fp32 -> numbers, and a scale for each row: 0 for a row of zeros."""
    scales = rows.abs().amax(-1) / torch.tensor(_LARGEST[dtype], device=rows.device)
    divisors = torch.where(scales == 0, 1.0, scales)
    steps = rows / divisors[..., None]
    if dtype == torch.int8:
        steps = steps.round()
    return steps.to(dtype), scales


def write_rows(kv: LayerKV, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store rows of [T, kv_heads, head_dim], rounded to what the arena holds."""
    for numbers, scales, rows in (
        (kv.keys, kv.key_scales, keys),
        (kv.values, kv.value_scales, values),
    ):
        if scales is None:
            numbers[slots] = rows.to(numbers.dtype)
        else:
            numbers[slots], scales[slots] = quantize_heads(rows.float(), numbers.dtype)


def kv_numbers(kv: LayerKV, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values in some slots, [N, kv_heads, head_dim] each, in fp32."""
    keys, values = kv.keys[slots].float(), kv.values[slots].float()
    if kv.key_scales is not None and kv.value_scales is not None:
        keys = keys * kv.key_scales[slots][..., None]
        values = values * kv.value_scales[slots][..., None]
    return keys, values
