"""Which weight is kept in which format on a GPU, and why. Knows a program's operations; no bytes.

As on the CPU (backends/cpu/formats.py), but fp16 stays fp16, and there is fp8.
"""

from dataclasses import dataclass
from typing import Literal

GpuFormatName = Literal["float32", "float16", "bfloat16", "int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class GpuFormat:
    """How the numbers of a matrix are kept; `group` of k share a scale, 0: a whole row, or none."""

    kind: GpuFormatName
    group: int = 0
