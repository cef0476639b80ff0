"""The reference backend: walks a Program operation by operation.

The twin that every other backend is compared with, and that every test trusts: made to be read,
and exact before it is fast.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, StepArrays
from duetto.backends.reference.kv import KVArena, allocate
from duetto.backends.reference.one_thread import one_blas_thread
from duetto.backends.reference.ops import OPS, Run
from duetto.program.dtype import KVDtype
from duetto.program.program import Program


class ReferenceBackend:
    """Computes in fp32 whatever the weights' dtype; widens them once, here."""

    def __init__(self, program: Program, weights: Mapping[str, NDArray[Any]]) -> None:
        self._program = program
        self._weights = {
            name: np.ascontiguousarray(weights[name], dtype=np.float32) for name in program.weights
        }

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> KVArena:
        """An arena for num_blocks blocks."""
        return allocate(self._program.kv, num_blocks, block_size, dtype)

    def run(self, step: StepArrays, kv: KVArena) -> FloatArray:
        """Write the step's KV and return logits [len(logit_rows), vocabulary]."""
        run = Run(step, kv, self._weights, self._program.buffers)
        with one_blas_thread():
            for op in self._program.ops:
                OPS[type(op)](op, run)
        return run.read(self._program.logits)
