"""The number formats that weights and KV are stored in, and their sizes. Knows no arrays."""

from collections.abc import Mapping
from typing import Literal, get_args

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DTYPE_BYTES: Mapping[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

KVDtype = Literal["float32", "float16", "bfloat16", "int8", "fp8"]
# Those that every backend stores: fp8 is the GPU's.
KV_DTYPES: tuple[KVDtype, ...] = (*DTYPES, "int8")
_SCALE_BYTES = 4


def auto_kv_dtype(weights: Dtype) -> Dtype:
    """What "auto" is for KV, as with all who serve: what the weights are, or are quantized from."""
    return weights


def kv_head_bytes(dtype: KVDtype, head_dim: int) -> int:
    """Bytes of one token's key, or value, of one KV head: int8 and fp8 have an fp32 scale beside
    it."""
    if dtype == "int8" or dtype == "fp8":
        return head_dim + _SCALE_BYTES
    return head_dim * DTYPE_BYTES[dtype]
