"""All ranks of a sharded program in one process, in lockstep: the slow twin of tensor parallelism.

Every rank computes an operation before any computes the next, and a collective is computed for all
of them together. Sums go in the order of ranks, so every rank has the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, StepArrays
from duetto.backends.reference.backend import check, widened
from duetto.backends.reference.kv import KVArena, allocate
from duetto.backends.reference.one_thread import one_blas_thread
from duetto.backends.reference.ops import OPS, Run, compute
from duetto.program.collectives import AllGather, AllReduce
from duetto.program.dtype import KVDtype
from duetto.program.op import Op
from duetto.program.program import Program


class ReferenceRanks:
    """A backend that is all ranks of `programs`, one a rank, as `shard` gives them."""

    def __init__(self, programs: Sequence[Program], weights: Mapping[str, NDArray[Any]]) -> None:
        """`weights` are whole. Raises ConfigError for an operation that has no meaning here."""
        for program in programs:
            check(program, OPS.keys() | COLLECTIVES.keys())
        self._programs = programs
        self._weights = [widened(program, weights) for program in programs]

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> tuple[KVArena, ...]:
        """An arena for num_blocks blocks on each rank."""
        return tuple(
            allocate(program.kv, num_blocks, block_size, dtype) for program in self._programs
        )

    def run(self, step: StepArrays, kv: tuple[KVArena, ...]) -> FloatArray:
        """Write the step's KV on every rank and return the first one's logits."""
        runs = [
            Run(step, arena, weights, program.buffers)
            for program, weights, arena in zip(self._programs, self._weights, kv, strict=True)
        ]
        with one_blas_thread():
            for ops in zip(*(program.ops for program in self._programs), strict=True):
                _compute(ops, runs)
        return runs[0].read(self._programs[0].logits)


def all_reduce(ops: Sequence[AllReduce], runs: Sequence[Run]) -> None:
    total, *others = [run.read(op.x) for op, run in zip(ops, runs, strict=True)]
    for other in others:
        total = total + other
    for op, run in zip(ops, runs, strict=True):
        run.write(op.x, total)


def all_gather(ops: Sequence[AllGather], runs: Sequence[Run]) -> None:
    parts = [(op.x, run.read(op.x)) for op, run in zip(ops, runs, strict=True)]
    for run in runs:
        for ref, numbers in parts:
            run.write(ref, numbers)


COLLECTIVES: dict[type[Op], Callable[[Sequence[Any], Sequence[Run]], None]] = {
    AllReduce: all_reduce,
    AllGather: all_gather,
}


def _compute(ops: Sequence[Op], runs: Sequence[Run]) -> None:
    if collective := COLLECTIVES.get(type(ops[0])):
        collective(ops, runs)
        return
    for op, run in zip(ops, runs, strict=True):
        compute(op, run)
