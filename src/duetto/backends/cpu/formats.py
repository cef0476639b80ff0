"""Which weight is kept in which format, and why. Knows a program's operations; no bytes.

What `quantization` quantizes, backends/weight_formats.py says. In int4 the projection to the logits
is int8: of all, it is the one whose errors nothing evens out. Norm weights and biases stay in fp32.
What stays in bf16 is kept in 12 bits a number, which loses none.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from duetto.backends.weight_formats import assign_formats
from duetto.program.dtype import Dtype
from duetto.program.program import Program

FormatName = Literal["f32", "bf16", "int8", "int4", "bf12"]
Quantization = Literal["int8", "int4"]


@dataclass(frozen=True, slots=True)
class Format:
    """How the numbers of a matrix are kept; `group` of k share a scale."""

    kind: FormatName
    group: int = 0  # 0: no scales


QUANTIZED: Mapping[Quantization, Format] = {"int8": Format("int8", 128), "int4": Format("int4", 64)}
HEAD_OF: Mapping[Quantization, Format] = {"int8": QUANTIZED["int8"], "int4": QUANTIZED["int8"]}
# Kernels multiply by fp32 or bf16: fp16 is widened, which changes no number.
STORED: Mapping[Dtype, Format] = {
    "float32": Format("f32"),
    "float16": Format("f32"),
    "bfloat16": Format("bf16"),
}
CODED = Format("bf12")


def choose_formats(
    program: Program,
    dtype: Dtype,
    quantization: Quantization | None = None,
    skip: Sequence[str] = (),
) -> dict[str, Format]:
    """The format of every matrix of the program, by its name. What is not in it is a vector.

    Raises ConfigError for a pattern of `skip` that no quantized tensor matches.
    """
    quantized = None
    if quantization is not None:
        quantized = QUANTIZED[quantization], HEAD_OF[quantization]
    return assign_formats(program, STORED[dtype], quantized, skip)


def without_loss(formats: Mapping[str, Format], plain: Collection[str] = ()) -> dict[str, Format]:
    """The same, with bf16 in 12 bits a number (csrc/kernels.h), except for the weights in `plain`.

    A step then reads a quarter less, and gets the same bits.
    """
    return {
        name: CODED if each == STORED["bfloat16"] and name not in plain else each
        for name, each in formats.items()
    }
