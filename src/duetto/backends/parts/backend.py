"""Parts in processes of their own, as one Backend.

A step's arrays go to every part, activations from stage to stage in shared memory, and logits come
back from the last stage's first rank. Several steps, over arenas of their own, may be under way at
one time: they are then in different stages. What is computed is each part's, and nobody's here.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

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
from duetto.backends.blocks import Bytes
from duetto.backends.parts.host import PartHost
from duetto.backends.parts.messages import (
    AllocateKV,
    ExportBlocks,
    FreeKV,
    ImportBlocks,
    MoveKV,
    ReadKV,
    RunStep,
    as_bytes,
)
from duetto.backends.parts.rows import MAX_PLACES, RowsMemory
from duetto.core.errors import EngineError
from duetto.program.dtype import KVDtype
from duetto.program.program import Program

_NO_LOOKS = "attention and deviations are not told by parts of a model (--tp, --pp)"
_NO_ROWS = "blocks of a model in parts (--tp, --pp) lie in other processes"
_MOST_BYTES = 32 << 20  # of blocks in one message


@dataclass(slots=True, weakref_slot=True, eq=False)
class PartsKV:
    """An arena on each part."""

    index: int
    block_bytes: tuple[int, ...]  # of each part
    turn: Lock = field(default_factory=Lock)  # one step at a time


class PartsBackend:
    """Any thread may call any method; steps of one arena wait for each other."""

    def __init__(
        self, program: Program, parts: Sequence[Sequence[Program]], host: PartHost
    ) -> None:
        """`program` is whole, and `parts` are its stages' ranks."""
        self._program, self._parts, self._host = program, parts, host
        self._speaker = (len(parts) - 1) * len(parts[0])
        self._results = RowsMemory(host.results, [program.logits.width])
        self._unused = list(range(MAX_PLACES))[::-1]
        self._freed: deque[int] = deque()  # by whom the last reference was dropped
        self.close = weakref.finalize(self, host.close)

    @property
    def host(self) -> PartHost:
        """The processes, for those who measure."""
        return self._host

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> PartsKV:
        """An arena of so many blocks on each part. Raises MemoryError."""
        while self._freed:
            index = self._freed.popleft()
            self._host.tell(lambda number, index=index: FreeKV(number, index))  # type: ignore[misc]
            self._unused.append(index)
        if not self._unused:
            raise MemoryError(f"{MAX_PLACES} KV arenas are in use")
        index = self._unused.pop()
        done = self._host.ask(
            lambda number: AllocateKV(number, index, num_blocks, block_size, dtype)
        )
        kv = PartsKV(index, tuple(done[part].number for part in sorted(done)))
        # Not told at once: a reference may be dropped anywhere, also while an order is being sent.
        weakref.finalize(kv, self._freed.append, index)
        return kv

    def run(self, step: StepArrays, kv: PartsKV) -> FloatArray:
        """Write the step's KV on every part and return logits [len(logit_rows), vocabulary]."""
        arrays, speaker = as_bytes(step), self._speaker
        with kv.turn:
            done = self._host.ask(
                lambda number: RunStep(number, kv.index, arrays), answers_from=[speaker]
            )
            (logits,) = self._results.views(kv.index, done[speaker].number)
            return logits.copy()

    def move_kv(self, moves: KVMoves, kv: PartsKV) -> None:
        """Bring tokens' KV to other slots, their keys turned for other positions."""
        arrays = as_bytes(moves)
        self._host.ask(lambda number: MoveKV(number, kv.index, arrays))

    def read_kv(self, layer: int, slots: IntArray, kv: PartsKV) -> tuple[FloatArray, FloatArray]:
        """The keys and values in some slots, in fp32, from the ranks that have that layer."""
        data, num_ranks = as_bytes([slots])[0], len(self._parts[0])
        stage = next(s for s, ranks in enumerate(self._parts) if layer in ranks[0].kv_layers)
        spec = self._program.kv[layer]
        own = self._parts[stage][0].kv[layer].num_kv_heads
        # A head that several ranks keep is asked of the first of them.
        step = own * num_ranks // spec.num_kv_heads
        to = [stage * num_ranks + rank for rank in range(0, num_ranks, step)]
        done = self._host.ask(lambda number: ReadKV(number, kv.index, layer, data), to=to)
        pairs = [
            np.frombuffer(done[part].data, np.float32).reshape(2, len(slots), own, spec.head_dim)
            for part in to
        ]
        keys, values = np.concatenate(pairs, axis=2)
        return keys, values

    def look_attention(
        self,
        step: StepArrays,  # noqa: ARG002
        kv: PartsKV,  # noqa: ARG002
        looks: Sequence[AttentionLook],  # noqa: ARG002
    ) -> tuple[FloatArray, list[ScoreArray]]:
        """Refused."""
        raise EngineError(_NO_LOOKS)

    def look_deviation(self, step: StepArrays, kv: PartsKV) -> ScoreArray:  # noqa: ARG002
        """Refused."""
        raise EngineError(_NO_LOOKS)

    def export_blocks(
        self, kv: PartsKV, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None:
        """Of each block, each part's bytes, one after the other."""
        assert out.shape == (len(blocks), sum(kv.block_bytes)), "not these blocks' bytes"
        for first, last in self._runs_of_blocks(kv, len(blocks)):
            some, counts = list(blocks[first:last]), list(num_tokens[first:last])
            done = self._host.ask(lambda n: ExportBlocks(n, kv.index, some, counts))  # noqa: B023
            start = 0
            for part, width in enumerate(kv.block_bytes):
                rows = np.frombuffer(done[part].data, np.uint8).reshape(len(some), width)
                out[first:last, start : start + width] = rows
                start += width

    def import_blocks(self, kv: PartsKV, blocks: Sequence[int], data: Bytes) -> None:
        """What `export_blocks` gave, into blocks of each part's arena."""
        assert data.shape == (len(blocks), sum(kv.block_bytes)), "not these blocks' bytes"
        assert len(set(blocks)) == len(blocks), "a block is written twice"
        for first, last in self._runs_of_blocks(kv, len(blocks)):
            start = 0
            for part, width in enumerate(kv.block_bytes):
                own, some = data[first:last, start : start + width].tobytes(), blocks[first:last]
                self._host.ask(
                    lambda n: ImportBlocks(n, kv.index, list(some), own),  # noqa: B023
                    to=[part],
                )
                start += width

    def block_rows(self, kv: PartsKV) -> Sequence[Sequence[Bytes]]:  # noqa: ARG002
        """Refused: arenas are in the memory of other processes."""
        raise EngineError(_NO_ROWS)

    @property
    def layers_done(self) -> LayersDone:
        """Nothing is told of a step under way."""
        return LayersDone(0, 0)

    def _runs_of_blocks(self, kv: PartsKV, num_blocks: int) -> list[tuple[int, int]]:
        count = max(1, _MOST_BYTES // max(kv.block_bytes))
        return [(i, min(i + count, num_blocks)) for i in range(0, num_blocks, count)]
