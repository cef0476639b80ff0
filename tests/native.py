"""The native backend over weights that a test has at hand: packed anew, no checkpoint, no cache."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.formats import choose_formats, without_loss
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.cpu.packed import PackedWeights, lay_out, load_packed
from duetto.backends.cpu.ranks import CpuRanks
from duetto.backends.reference.backend import part_of
from duetto.program.cut import WHOLE, WeightPart
from duetto.program.program import Program
from duetto.program.rewrites.shard import shard


@cache
def pool(num_threads: int) -> Any:
    return native.Pool(num_threads)


def pack(
    program: Program, weights: Mapping[str, NDArray[Any]], quantization: Any = None
) -> PackedWeights:
    """Weights are packed in the dtype that they come in, bf16 in 12 bits."""
    dtype: Any = next(iter(weights.values())).dtype.name
    layout = lay_out(program, without_loss(choose_formats(program, dtype, quantization)))
    return load_packed(layout, lambda: whole(weights), pool(2), None, "")[0]


@dataclass(frozen=True)
class Whole:
    """A weight at hand, as load_packed takes it."""

    name: str
    weight: NDArray[Any]
    first_row: int = 0
    num_bytes: int = 0

    def read(self, scratch: NDArray[np.uint8]) -> NDArray[Any]:
        return self.weight


def whole(weights: Mapping[str, NDArray[Any]]) -> Iterator[Whole]:
    return (Whole(name, weight) for name, weight in weights.items())


def cpu_ranks(
    program: Program,
    weights: Mapping[str, NDArray[Any]],
    ranks: int,
    quantization: Any = None,
    *,
    threads: Sequence[int] = (),
    isa: str | None = None,
    slot_numbers: int = 1 << 16,
) -> CpuRanks:
    """All ranks, each with so many threads, or one."""
    programs = [shard(program, ranks, rank) for rank in range(ranks)]
    packed = [pack_rank(program, each, weights, quantization) for each in programs]
    group = native.Group(ranks, slot_numbers)
    return CpuRanks(program, programs, packed, threads or [1] * ranks, choose_isa(isa), group)


def pack_rank(
    whole_program: Program,
    program: Program,
    weights: Mapping[str, NDArray[Any]],
    quantization: Any = None,
) -> PackedWeights:
    """What a rank has of these weights."""
    dtype: Any = next(iter(weights.values())).dtype.name
    formats = without_loss(choose_formats(whole_program, dtype, quantization))
    layout = lay_out(program, {name: formats[name] for name in formats.keys() & program.weights})
    rows = {
        name: part_of(weights[name], WeightPart(rows=program.parts.get(name, WHOLE).rows))
        for name in program.weights
    }
    return load_packed(layout, lambda: whole(rows), pool(2), None, "")[0]


def cpu_backend(
    program: Program,
    weights: Mapping[str, NDArray[Any]],
    quantization: Any = None,
    *,
    threads: int = 2,
    isa: str | None = None,
) -> CpuBackend:
    packed = pack(program, weights, quantization)
    return CpuBackend(program, packed, pool(threads), choose_isa(isa))
