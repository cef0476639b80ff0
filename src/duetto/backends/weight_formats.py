"""Which weights of a program are quantized, whatever a backend's formats are. Knows no bytes.

Projections are what a step reads whole, so they are what is quantized. An embedding is looked up
row by row: quantizing it would save nothing that a step reads, so it is quantized only where the
logits are made of it too (tied embeddings), and the two then are one copy.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from duetto.core.errors import ConfigError
from duetto.program.program import Program

AnyFormat = TypeVar("AnyFormat")


def assign_formats(
    program: Program,
    stored: AnyFormat,
    quantized: tuple[AnyFormat, AnyFormat] | None,
    skip: Sequence[str] = (),
) -> dict[str, AnyFormat]:
    """The format of every matrix of the program, by its name. What is not in it is a vector.

    `quantized` is that of projections, and of the one to the logits; None: all are `stored`.
    `skip` has patterns (fnmatch) of the names of tensors, or of modules (without `.weight`), that
    are not quantized. Projections that are stacked stay together: a pattern that matches one of
    them keeps all. Raises ConfigError for a pattern that no quantized tensor matches.
    """
    embedded = {op.weights[0] for op in program.ops if op.kind == "embed"}
    projected = {op.weights[0]: op for op in program.ops if op.kind == "linear"}
    formats = dict.fromkeys(embedded | projected.keys(), stored)
    if quantized is not None:
        for name, op in projected.items():
            is_head = any(ref.buffer == program.logits.buffer for ref in op.writes)
            formats[name] = quantized[is_head]
    unused = set(skip)
    for name in projected:
        matching = {pattern for pattern in skip if _matches(program, name, pattern)}
        unused -= matching
        if matching:
            formats[name] = stored
    if unused:
        raise ConfigError(
            f"--quantization-skip: {min(unused)!r} matches no tensor that is quantized; their "
            f"names are as in the checkpoint, such as {min(projected)!r}"
        )
    return formats


def _matches(program: Program, name: str, pattern: str) -> bool:
    sources = program.weights[name].sources
    return any(
        fnmatchcase(source, pattern) or fnmatchcase(source.removesuffix(".weight"), pattern)
        for source in sources
    )
