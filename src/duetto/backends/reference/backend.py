"""The reference backend: walks a Program operation by operation.

The twin that every other backend is compared with, and that every test trusts: made to be read,
and exact before it is fast.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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
from duetto.backends.looks import attention_scores, deviations
from duetto.backends.moves import turned, turns
from duetto.backends.reference.kv import KVArena, allocate
from duetto.backends.reference.meeting import compute_with_others
from duetto.backends.reference.one_thread import one_blas_thread
from duetto.backends.reference.ops import OPS, Given, Run
from duetto.core.errors import ConfigError
from duetto.program.collectives import AllGather, AllReduce
from duetto.program.cut import WHOLE, WeightPart
from duetto.program.dtype import KVDtype
from duetto.program.looks import LOOKED_LAYER, num_ops_up_to_kv
from duetto.program.op import Op
from duetto.program.ops import WriteKV
from duetto.program.program import Program
from duetto.program.rotation import key_rotations

if TYPE_CHECKING:  # the module may not have been built
    from duetto._native import Member

COLLECTIVES = {AllReduce, AllGather}


class ReferenceBackend:
    """Computes in fp32 whatever the weights' dtype; widens them once, here."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, NDArray[Any]],
        *,
        is_stage: bool = False,
        member: "Member | None" = None,
    ) -> None:
        """Raises ConfigError for an operation that has no meaning here, and for a program of one
        rank or stage unless it is known to be one (`run_stage` is then for it): ranks.py and
        stages.py run all of them. `member` is where a rank meets the others."""
        check(program, OPS.keys() | (COLLECTIVES if member is not None else set()))
        has_stage = bool(program.inputs or program.outputs)
        if (program.parts and member is None) or (has_stage and not is_stage):
            raise ConfigError("--backend reference: runs no part of a program (--tp, --pp)")
        self._program, self._member = program, member
        self._weights = widened(program, weights)
        self._layers_done = LayersDone(0, 0)

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> KVArena:
        """An arena for num_blocks blocks."""
        return allocate(self._program.kv, num_blocks, block_size, dtype)

    def run(self, step: StepArrays, kv: KVArena) -> FloatArray:
        """Write the step's KV and return logits [len(logit_rows), vocabulary]."""
        return self._logits(Run(step, kv, self._weights, self._program.buffers))

    def run_stage(
        self, step: StepArrays, kv: KVArena, inputs: Sequence[FloatArray]
    ) -> list[FloatArray]:
        """As backends/parts/part.py says."""
        run = Run(step, kv, self._weights, self._program.buffers)
        for ref, numbers in zip(self._program.inputs, inputs, strict=True):
            run.write(ref, numbers)
        self._compute_all(self._program.ops, run)
        return [run.read(ref) for ref in self._program.results]

    def block_bytes(self, kv: KVArena) -> int:
        return sum(array.shape[1] for array in kv.rows_of_blocks())

    def _logits(self, run: Run) -> FloatArray:
        self._compute_all(self._program.ops, run)
        return run.read(self._program.logits)

    def move_kv(self, moves: KVMoves, kv: KVArena) -> None:
        """Bring tokens' KV to other slots, their keys turned for other positions."""
        assert not np.intersect1d(moves.from_slots, moves.to_slots).size, "read and written"
        assert len(np.unique(moves.to_slots)) == len(moves.to_slots), "written twice"
        for layer, turn in enumerate(turns(key_rotations(self._program), moves)):
            keys, values = kv.keys[layer], kv.values[layer]
            values.copy(moves.from_slots, moves.to_slots)
            if turn is None:
                keys.copy(moves.from_slots, moves.to_slots)
                continue
            rows = turned(keys.at(moves.from_slots), turn)
            keys.write(moves.to_slots, rows.reshape(len(rows), -1))

    def read_kv(self, layer: int, slots: IntArray, kv: KVArena) -> tuple[FloatArray, FloatArray]:
        """The keys and values in some slots, in fp32."""
        return kv.keys[layer].at(slots), kv.values[layer].at(slots)

    def look_attention(
        self, step: StepArrays, kv: KVArena, looks: Sequence[AttentionLook]
    ) -> tuple[FloatArray, list[ScoreArray]]:
        """As `run`; and how much attention some runs' tokens give to some positions."""
        given = [Given(look.first, look.last, int(look.positions[-1]) + 1) for look in looks]
        run = Run(step, kv, self._weights, self._program.buffers, given=given)
        logits = self._logits(run)
        scores = [
            attention_scores(one.units[look.positions], one.num_lost)
            for look, one in zip(looks, given, strict=True)
        ]
        return logits, scores

    def look_deviation(self, step: StepArrays, kv: KVArena) -> ScoreArray:
        """Compute up to layer 1's KV; how far it is from what lay in its place."""
        ops = self._program.ops[: num_ops_up_to_kv(self._program, self._program.ops)]
        before = self.read_kv(LOOKED_LAYER, step.slots, kv)
        self._compute_all(ops, Run(step, kv, self._weights, self._program.buffers))
        return deviations(before, self.read_kv(LOOKED_LAYER, step.slots, kv))

    def export_blocks(
        self, kv: KVArena, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None:
        """The bytes of whole blocks, all layers; zeros behind the last token of one that is not
        full."""
        arrays, start = kv.rows_of_blocks(), 0
        copy_out(arrays, blocks, out)
        for array in arrays if num_tokens else ():
            token_bytes = array.shape[1] // kv.block_size
            for row, count in zip(out, num_tokens, strict=True):
                row[start + count * token_bytes : start + array.shape[1]] = 0
            start += array.shape[1]

    def import_blocks(self, kv: KVArena, blocks: Sequence[int], data: Bytes) -> None:
        """What `export_blocks` gave, into blocks of the arena."""
        copy_in(kv.rows_of_blocks(), blocks, data)

    def block_rows(self, kv: KVArena) -> list[list[Bytes]]:
        """Of each layer: keys, their scales, values, their scales."""
        return kv.rows_by_layer()

    @property
    def layers_done(self) -> LayersDone:
        """Of the step that runs, or ran last."""
        return self._layers_done

    def _compute_all(self, ops: Sequence[Op], run: Run) -> None:
        step, done = self._layers_done.step + 1, 0
        self._layers_done = LayersDone(step, done)
        with one_blas_thread():
            for op in ops:
                compute_with_others(op, run, self._member)
                if isinstance(op, WriteKV) and op.layer == done:
                    done += 1
                    self._layers_done = LayersDone(step, done)


def check(program: Program, known: Collection[type[Op]]) -> None:
    """Raises ConfigError, naming it, for an operation that is not `known`."""
    for op in program.ops:
        if type(op) not in known:
            raise ConfigError(
                f"--backend reference: knows no operation {type(op).__name__}, which this model has"
            )


def widened(program: Program, weights: Mapping[str, NDArray[Any]]) -> dict[str, FloatArray]:
    """What the program needs of these weights, in fp32: of a whole weight, a rank's part."""
    return {
        name: np.ascontiguousarray(
            part_of(weights[name], program.parts.get(name, WHOLE)), dtype=np.float32
        )
        for name in program.weights
    }


def part_of(weight: NDArray[Any], part: WeightPart) -> NDArray[Any]:
    """What a rank has of a weight."""
    if part.rows is not None:
        weight = np.concatenate([weight[start : start + width] for start, width in part.rows])
    if part.columns is not None:
        own = [weight[:, start : start + width] for start, width in part.columns]
        weight = np.concatenate(own, axis=1)
    return weight
