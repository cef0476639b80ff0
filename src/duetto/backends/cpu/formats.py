"""Which weight is kept in which format, and why. Knows a program's operations; no bytes.

Projections are what a step reads whole, so they are what `quantization` quantizes. An embedding is
looked up row by row: quantizing it would save nothing that a step reads, so it is quantized only
where the logits are made of it too (tied embeddings), and the two then are one copy. In int4 the
projection to the logits is int8: of all, it is the one whose errors nothing evens out. Norm
weights and biases stay in fp32. What stays in bf16 is kept in 12 bits a number, which loses none.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from duetto.core.errors import ConfigError
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

    `skip` has patterns (fnmatch) of the names of tensors, or of modules (without `.weight`), that
    are not quantized. Projections that are stacked stay together: a pattern that matches one of
    them keeps all. Raises ConfigError for a pattern that no quantized tensor matches.
    """
    embedded = {op.weights[0] for op in program.ops if op.kind == "embed"}
    projected = {op.weights[0]: op for op in program.ops if op.kind == "linear"}
    formats = dict.fromkeys(embedded | projected.keys(), STORED[dtype])
    if quantization is not None:
        for name, op in projected.items():
            is_head = any(ref.buffer == program.logits.buffer for ref in op.writes)
            formats[name] = (HEAD_OF if is_head else QUANTIZED)[quantization]
    unused = set(skip)
    for name in projected:
        matching = {pattern for pattern in skip if _matches(program, name, pattern)}
        unused -= matching
        if matching:
            formats[name] = STORED[dtype]
    if unused:
        raise ConfigError(
            f"--quantization-skip: {min(unused)!r} matches no tensor that is quantized; their "
            f"names are as in the checkpoint, such as {min(projected)!r}"
        )
    return formats


def without_loss(formats: Mapping[str, Format], plain: Collection[str] = ()) -> dict[str, Format]:
    """The same, with bf16 in 12 bits a number (csrc/kernels.h), except for the weights in `plain`.

    A step then reads a quarter less, and gets the same bits.
    """
    return {
        name: CODED if each == STORED["bfloat16"] and name not in plain else each
        for name, each in formats.items()
    }


def _matches(program: Program, name: str, pattern: str) -> bool:
    sources = program.weights[name].sources
    return any(
        fnmatchcase(source, pattern) or fnmatchcase(source.removesuffix(".weight"), pattern)
        for source in sources
    )
