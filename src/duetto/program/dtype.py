"""The number formats that weights and KV are stored in, and their sizes. Knows no arrays."""

from collections.abc import Mapping
from typing import Literal, get_args

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DTYPE_BYTES: Mapping[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
