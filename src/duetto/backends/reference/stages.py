"""All stages of a pipeline in one process, one after the other: its slow twin.

Each stage has buffers, weights and KV of its own; what goes from one to the next is what the
program says that it needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, StepArrays
from duetto.backends.reference.backend import check, widened
from duetto.backends.reference.kv import KVArena, allocate
from duetto.backends.reference.one_thread import one_blas_thread
from duetto.backends.reference.ops import OPS, Run, compute
from duetto.program.dtype import KVDtype
from duetto.program.program import Program


class ReferenceStages:
    """A backend that is every stage of `programs`, as `stages` gives them."""

    def __init__(self, programs: Sequence[Program], weights: Mapping[str, NDArray[Any]]) -> None:
        """Raises ConfigError for an operation that has no meaning here."""
        for program in programs:
            check(program, OPS)
        self._programs = programs
        self._weights = [widened(program, weights) for program in programs]

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> tuple[KVArena, ...]:
        """An arena for num_blocks blocks in each stage."""
        return tuple(
            allocate(program.kv, num_blocks, block_size, dtype) for program in self._programs
        )

    def run(self, step: StepArrays, kv: tuple[KVArena, ...]) -> FloatArray:
        """Write the step's KV in every stage and return the last one's logits."""
        sent: list[FloatArray] = []
        for program, weights, arena in zip(self._programs, self._weights, kv, strict=True):
            run = Run(step, arena, weights, program.buffers)
            for ref, numbers in zip(program.inputs, sent, strict=True):
                run.write(ref, numbers)
            with one_blas_thread():
                for op in program.ops:
                    compute(op, run)
            sent = [run.read(ref) for ref in program.outputs]
        return run.read(program.logits)
