"""The native backend over weights that a test has at hand: packed anew, no checkpoint, no cache."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.formats import choose_formats, without_loss
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.cpu.packed import PackedWeights, lay_out, load_packed
from duetto.program.program import Program


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
