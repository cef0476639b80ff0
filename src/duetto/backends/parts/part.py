"""What a part is: some of a model's operations, and the KV of its layers and heads.

Rank r of stage s. All ranks of a stage compute the same step at the same time, and stages one after
the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from duetto.backends.backend import FloatArray, IntArray, KVMoves, StepArrays
from duetto.backends.blocks import Bytes
from duetto.program.dtype import KVDtype


class PartPlace(NamedTuple):
    """Which part of a model."""

    stage: int
    num_stages: int
    rank: int = 0
    num_ranks: int = 1

    def __str__(self) -> str:
        stage = f"stage {self.stage} of {self.num_stages}"
        rank = f"rank {self.rank} of {self.num_ranks}"
        if self.num_ranks == 1:
            return stage
        return rank if self.num_stages == 1 else f"{rank}, {stage}"


class ModelPart(Protocol):
    """Of a Backend, what one part does."""

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> Any: ...

    def block_bytes(self, kv: Any) -> int:
        """What `export_blocks` gives of one block."""
        ...

    def run_stage(
        self, step: StepArrays, kv: Any, inputs: Sequence[FloatArray]
    ) -> list[FloatArray]:
        """Write the step's KV. `inputs` are rows of `Program.inputs`, as the stage before gave
        them; returns those of `Program.results`."""
        ...

    def move_kv(self, moves: KVMoves, kv: Any) -> None: ...

    def read_kv(self, layer: int, slots: IntArray, kv: Any) -> tuple[FloatArray, FloatArray]:
        """Of a layer that it has."""
        ...

    def export_blocks(
        self, kv: Any, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None: ...

    def import_blocks(self, kv: Any, blocks: Sequence[int], data: Bytes) -> None: ...
