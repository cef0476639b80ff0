"""Which weight is kept in which format on a GPU, why, and in how many bytes. Knows no torch.

As on the CPU (backends/cpu/formats.py), but fp16 stays fp16, and there is fp8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
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


ALIGNMENT = 256  # of what lies in the arena of weights, in bytes
_NUMBER_BYTES: Mapping[GpuFormatName, float] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "fp8": 1,
    "int4": 0.5,
}


def device_weight_bytes(program: Program, formats: Mapping[str, GpuFormat]) -> int:
    """All that a program's weights take on the device: what backends/cuda/weights.py allocates."""
    sizes: list[int] = []
    for name, spec in program.weights.items():
        if name in formats:
            num_outputs, num_inputs = spec.shape
            sizes += matrix_bytes(formats[name], num_outputs, num_inputs)
        else:
            sizes.append(4 * prod(spec.shape))
    return sum(aligned(size) for size in sizes)


def matrix_bytes(format: GpuFormat, num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Of a matrix' data, and of its scales."""
    groups = num_groups(format, num_inputs)
    columns = groups * format.group if format.kind == "int4" else num_inputs
    return int(num_outputs * columns * _NUMBER_BYTES[format.kind]), 4 * num_outputs * groups


def num_groups(format: GpuFormat, num_inputs: int) -> int:
    """Scales of a row."""
    if format.group:
        return -(-num_inputs // format.group)
    return 1 if format.kind == "fp8" else 0


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
