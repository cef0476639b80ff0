"""The native CPU backend: a Program as one native plan, one call per step.

Computes in fp32 between operations; what projections multiply with is in their weight's format.
Knows what a Backend knows, and how its weights and KV are kept; no kernel and no thread.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from duetto.backends.backend import (
    AttentionLook,
    FloatArray,
    IntArray,
    KVMoves,
    LayersDone,
    ScoreArray,
    StepArrays,
)
from duetto.backends.blocks import Bytes, copy_in, copy_out
from duetto.backends.cpu.compile import Compiler
from duetto.backends.cpu.native import in_words, native
from duetto.backends.cpu.packed import PackedWeights
from duetto.backends.looks import attention_scores, deviations
from duetto.backends.moves import turns
from duetto.program.dtype import KVDtype
from duetto.program.looks import LOOKED_LAYER, num_ops_up_to_kv
from duetto.program.program import Program
from duetto.program.rotation import key_rotations

if TYPE_CHECKING:
    from duetto._native import KvArena, KvFormat, Member, Pool

_KV_FORMATS: dict[KVDtype, "KvFormat"] = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int8": "int8",
}


def kv_block_bytes(program: Program, block_size: int, dtype: KVDtype, isa: str) -> int:
    """What a block of all layers takes in this backend's layout.

    Raises ConfigError, naming the dimension, for heads that the kernels cannot take.
    """
    return sum(
        in_words(
            "--backend cpu",
            native.kv_block_bytes,
            _KV_FORMATS[dtype],
            block_size,
            layer.num_kv_heads,
            layer.head_dim,
            isa,
        )
        for layer in program.kv
        if layer.num_kv_heads  # else it is another stage's
    )


class CpuBackend:
    """Runs on the threads of `pool`, with the kernels of `isa`.

    What a request gets depends on neither the threads nor the company, bit for bit; on the
    instruction set it does, in the last bits.
    """

    def __init__(
        self,
        program: Program,
        weights: PackedWeights,
        pool: "Pool",
        isa: str,
        *,
        is_stage: bool = False,
        member: "Member | None" = None,
    ) -> None:
        """Raises ConfigError for an operation or a dimension that the kernels cannot take, and for
        a program of one stage unless it is known to be one (`run_stage` is then for it).

        `member`: the program is one rank's (rewrites/shard.py), which meets the others there. All
        ranks run the same steps; what does not meet (reading, moving KV) is each rank's own, of
        the KV heads that it has. Steps raise GroupEnded if they can meet no more.
        """
        self._program = program
        self._layers = program.kv_layers  # those in an arena
        self._isa = isa
        self._pool = pool
        self._plan = native.Plan(pool, isa, member)
        matrices, vectors, is_rank = weights.matrices, weights.vectors, member is not None
        compiler = Compiler(
            program, self._plan, matrices, vectors, is_stage=is_stage, is_rank=is_rank
        )
        self.steps, self._logits = in_words("--backend cpu", compiler.compile)
        self._inputs = [compiler.columns(ref) for ref in program.inputs]
        self._outputs = [compiler.columns(ref) for ref in program.outputs]
        rotations = key_rotations(program)
        self._rotations = [rotations[layer] for layer in self._layers]

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> "KvArena":
        """An arena for num_blocks blocks. Raises MemoryError if the system has no room for it."""
        layers = self._heads()
        return native.KvArena(num_blocks, block_size, layers, _KV_FORMATS[dtype], self._isa)

    def _heads(self) -> list[tuple[int, int]]:
        kv = self._program.kv
        return [(kv[layer].num_kv_heads, kv[layer].head_dim) for layer in self._layers]

    def run(self, step: StepArrays, kv: "KvArena") -> FloatArray:
        """Write the step's KV and return logits [len(logit_rows), vocabulary]."""
        return self._plan.run(*step, kv, self._logits)

    def run_stage(
        self, step: StepArrays, kv: "KvArena", inputs: Sequence[FloatArray]
    ) -> list[FloatArray]:
        """As backends/parts/part.py says."""
        for columns, numbers in zip(self._inputs, inputs, strict=True):
            self._plan.write(columns, numbers)
        result = self._plan.run(*step, kv, self._logits)
        return [self._plan.read(columns) for columns in self._outputs] or [result]

    def block_bytes(self, kv: "KvArena") -> int:
        return sum(kv.blocks(layer).shape[1] for layer in range(kv.num_layers))

    def move_kv(self, moves: KVMoves, kv: "KvArena") -> None:
        """Bring tokens' KV to other slots, their keys turned for other positions."""
        kv.move(self._pool, moves.from_slots, moves.to_slots, turns(self._rotations, moves))

    def read_kv(self, layer: int, slots: IntArray, kv: "KvArena") -> tuple[FloatArray, FloatArray]:
        """The keys and values in some slots, in fp32."""
        if layer not in self._layers:
            raise ValueError(f"no layer {layer}: there are {self._layers}")
        return kv.read(self._pool, self._layers.index(layer), slots)

    def look_attention(
        self, step: StepArrays, kv: "KvArena", looks: Sequence[AttentionLook]
    ) -> tuple[FloatArray, list[ScoreArray]]:
        """As `run`; and how much attention some runs' tokens give to some positions."""
        wanted = [
            (look.first, look.last, int(look.positions[0]), int(look.positions[-1]) + 1)
            for look in looks
        ]
        looked = np.empty(sum(end - begin + 1 for _, _, begin, end in wanted), np.int64)
        logits = self._plan.run(*step, kv, self._logits, looks=wanted, looked=looked)
        scores, start = [], 0
        for look, (_, _, begin, end) in zip(looks, wanted, strict=True):
            num_lost = int(looked[start + end - begin])
            scores.append(attention_scores(looked[start + look.positions - begin], num_lost))
            start += end - begin + 1
        return logits, scores

    def look_deviation(self, step: StepArrays, kv: "KvArena") -> ScoreArray:
        """Compute up to layer 1's KV; how far it is from what lay in its place."""
        num_ops = num_ops_up_to_kv(self._program, self.steps)
        before = self.read_kv(LOOKED_LAYER, step.slots, kv)
        self._plan.run(*step, kv, self._logits, num_ops=num_ops)
        return deviations(before, self.read_kv(LOOKED_LAYER, step.slots, kv))

    def export_blocks(
        self, kv: "KvArena", blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None:
        """The bytes of whole blocks, all layers; zeros behind the last token of one that is not
        full."""
        copy_out([kv.blocks(layer) for layer in range(kv.num_layers)], blocks, out)
        for row, count in enumerate(num_tokens):
            if count < kv.block_size:
                self._export_first(kv, blocks[row], out[row : row + 1], count)

    def _export_first(self, kv: "KvArena", block: int, out: Bytes, num_tokens: int) -> None:
        """A block's first tokens, brought to one of zeros: kernels alone know where they lie."""
        layers = self._heads()
        two = native.KvArena(2, kv.block_size, layers, kv.format, self._isa)
        arrays = [two.blocks(layer) for layer in range(kv.num_layers)]
        for layer, array in enumerate(arrays):
            array[0], array[1] = kv.blocks(layer)[block], 0
        slots = np.arange(num_tokens, dtype=np.int32)
        two.move(self._pool, slots, slots + np.int32(kv.block_size), [None] * kv.num_layers)
        copy_out(arrays, (1,), out)

    def import_blocks(self, kv: "KvArena", blocks: Sequence[int], data: Bytes) -> None:
        """What `export_blocks` gave, into blocks of the arena."""
        copy_in([kv.blocks(layer) for layer in range(kv.num_layers)], blocks, data)

    def block_rows(self, kv: "KvArena") -> list[list[Bytes]]:
        """One array of each layer: keys, values and scales of a block lie side by side."""
        return [[kv.blocks(layer)] for layer in range(kv.num_layers)]

    @property
    def layers_done(self) -> LayersDone:
        """Of the step that runs, or ran last."""
        return LayersDone(*self._plan.layers_done)

    def times(self) -> list[float]:
        """Seconds of each of `steps` in the last run, then of all native work outside them."""
        return self._plan.times()
