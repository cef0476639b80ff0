"""Which weight is kept in which format on a GPU, and why. Knows a program's operations; no bytes.

As on the CPU (backends/cpu/formats.py), but fp16 stays fp16, and there is fp8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from duetto.backends.weight_formats import assign_formats
from duetto.program.dtype import Dtype
from duetto.program.program import Program

GpuQuantization = Literal["int8", "int4", "fp8"]
GpuFormatName = Literal["float32", "float16", "bfloat16", "int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class GpuFormat:
    """How the numbers of a matrix are kept; `group` of k share a scale, 0: a whole row, or none."""

    kind: GpuFormatName
    group: int = 0


_INT8, _INT4, _FP8 = GpuFormat("int8", 128), GpuFormat("int4", 64), GpuFormat("fp8")
# Of projections, and of the one to the logits: of all, its errors are those that nothing evens out.
_QUANTIZED: Mapping[GpuQuantization, tuple[GpuFormat, GpuFormat]] = {
    "int8": (_INT8, _INT8),
    "int4": (_INT4, _INT8),
    "fp8": (_FP8, _FP8),
}


def choose_gpu_formats(
    program: Program,
    dtype: Dtype,
    quantization: GpuQuantization | None = None,
    skip: Sequence[str] = (),
) -> dict[str, GpuFormat]:
    """The format of every matrix of the program, by its name. What is not in it is a vector.

    Raises ConfigError for a pattern of `skip` that no quantized tensor matches."""
    quantized = None if quantization is None else _QUANTIZED[quantization]
    return assign_formats(program, GpuFormat(dtype), quantized, skip)
