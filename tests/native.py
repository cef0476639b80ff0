"""The native backend over weights that a test has at hand: packed anew, no checkpoint, no cache."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from numpy.typing import NDArray

from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.formats import choose_formats
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.cpu.packed import PackedWeights, lay_out, load_packed
from duetto.program.program import Program


@cache
def pool(num_threads: int) -> Any:
    return native.Pool(num_threads)


def pack(
    program: Program, weights: Mapping[str, NDArray[Any]], quantization: Any = None
) -> PackedWeights:
    """Weights are packed in the dtype that they come in."""
    dtype: Any = next(iter(weights.values())).dtype.name
    layout = lay_out(program, choose_formats(program, dtype, quantization))
    return load_packed(layout, lambda: whole(weights), pool(2), None, "")[0]


def whole(weights: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """Weights as load_packed takes them."""
    return ((name, 0, weight) for name, weight in weights.items())


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
