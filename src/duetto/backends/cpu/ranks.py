"""All ranks of a sharded program as threads of one process: the twin of ranks that are processes.

They meet as those do (csrc/group.h), in memory that they share anyway. What is a rank's own is
joined here: KV heads, attention that heads give, bytes of blocks.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

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
from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.native import native
from duetto.backends.cpu.packed import PackedWeights
from duetto.backends.looks import deviations
from duetto.program.dtype import KVDtype
from duetto.program.looks import LOOKED_LAYER
from duetto.program.program import Program

if TYPE_CHECKING:
    from duetto._native import Group, KvArena

_T = TypeVar("_T")
Arenas = tuple["KvArena", ...]  # of each rank


class CpuRanks:
    """A backend that is all ranks of `programs`, one a rank, as `shard` gives them; `whole` is what
    they are the ranks of. Each has threads of its own."""

    def __init__(
        self,
        whole: Program,
        programs: Sequence[Program],
        weights: Sequence[PackedWeights],
        num_threads: Sequence[int],
        isa: str,
        group: "Group | None" = None,
    ) -> None:
        self._whole = whole
        self._group = group or native.Group(len(programs))
        self._ranks = [
            CpuBackend(
                program, packed, native.Pool(threads), isa, member=native.Member(self._group, rank)
            )
            for rank, (program, packed, threads) in enumerate(
                zip(programs, weights, num_threads, strict=True)
            )
        ]
        self._threads = ThreadPoolExecutor(len(programs))

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: KVDtype) -> Arenas:
        """An arena for num_blocks blocks on each rank."""
        return tuple(rank.allocate_kv(num_blocks, block_size, dtype) for rank in self._ranks)

    def run(self, step: StepArrays, kv: Arenas) -> FloatArray:
        """Write the step's KV on every rank and return the first one's logits."""
        return self._together(lambda rank, own: rank.run(step, own), kv)[0]

    def move_kv(self, moves: KVMoves, kv: Arenas) -> None:
        for rank, own in zip(self._ranks, kv, strict=True):
            rank.move_kv(moves, own)

    def read_kv(self, layer: int, slots: IntArray, kv: Arenas) -> tuple[FloatArray, FloatArray]:
        """All heads'. Where ranks are more than heads, several have the same one."""
        step = max(1, len(self._ranks) // self._whole.kv[layer].num_kv_heads)
        found = [
            rank.read_kv(layer, slots, own)
            for rank, own in list(zip(self._ranks, kv, strict=True))[::step]
        ]
        keys, values = zip(*found, strict=True)
        return np.concatenate(keys, axis=1), np.concatenate(values, axis=1)

    def look_attention(
        self, step: StepArrays, kv: Arenas, looks: Sequence[AttentionLook]
    ) -> tuple[FloatArray, list[ScoreArray]]:
        """Scores are sums of whole units over heads, so those of ranks add up to them exactly."""
        found = self._together(lambda rank, own: rank.look_attention(step, own, looks), kv)
        scores = [np.sum(parts, axis=0) for parts in zip(*(own for _, own in found), strict=True)]
        return found[0][0], scores

    def look_deviation(self, step: StepArrays, kv: Arenas) -> ScoreArray:
        before = self.read_kv(LOOKED_LAYER, step.slots, kv)
        self._together(lambda rank, own: rank.look_deviation(step, own), kv)
        return deviations(before, self.read_kv(LOOKED_LAYER, step.slots, kv))

    def export_blocks(
        self, kv: Arenas, blocks: Sequence[int], out: Bytes, num_tokens: Sequence[int] = ()
    ) -> None:
        """A block is its ranks' bytes, one after the other, each layer by layer."""
        for rank, own, columns in self._columns(kv):
            part = np.empty((len(blocks), columns.stop - columns.start), np.uint8)
            rank.export_blocks(own, blocks, part, num_tokens)
            out[:, columns] = part

    def import_blocks(self, kv: Arenas, blocks: Sequence[int], data: Bytes) -> None:
        for rank, own, columns in self._columns(kv):
            rank.import_blocks(own, blocks, np.ascontiguousarray(data[:, columns]))

    def block_rows(self, kv: Arenas) -> list[list[Bytes]]:
        """Of each layer, one array of each rank."""
        by_rank = [rank.block_rows(own) for rank, own in zip(self._ranks, kv, strict=True)]
        return [[array for own in layer for array in own] for layer in zip(*by_rank, strict=True)]

    @property
    def layers_done(self) -> LayersDone:
        """On every rank."""
        return min(rank.layers_done for rank in self._ranks)

    def times(self) -> list[float]:
        """Seconds of each of the first rank's operations."""
        return self._ranks[0].times()

    def _columns(self, kv: Arenas) -> list[tuple[CpuBackend, "KvArena", slice]]:
        found, start = [], 0
        for rank, own in zip(self._ranks, kv, strict=True):
            end = start + own.num_bytes // own.num_blocks
            found.append((rank, own, slice(start, end)))
            start = end
        return found

    def _together(self, work: Callable[[CpuBackend, "KvArena"], _T], kv: Arenas) -> list[_T]:
        """On every rank at once. What is refused, all refuse alike; whatever else one of them
        raises ends the group, or the others would wait for it."""

        def one(rank: CpuBackend, own: "KvArena") -> _T:
            try:
                return work(rank, own)
            except ValueError:
                raise
            except BaseException:
                self._group.end()
                raise

        started = [
            self._threads.submit(one, rank, own) for rank, own in zip(self._ranks, kv, strict=True)
        ]
        wait(started)
        return [each.result() for each in started]
