"""Does a step's block moves: between the arena and RAM at once, to and from the disk behind it.

Each move is done once, however often its step is submitted, and each has one result, told until a
batch says that it was taken. Knows block numbers, slots and bytes; not why something is moved.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from duetto.backends.backend import Backend
from duetto.backends.blocks import Bytes
from duetto.core.batch import BlockMove, MoveResult, ScheduledBatch
from duetto.core.errors import EngineError
from duetto.core.offloading import WAIT_S
from duetto.runner.tiers.disk import DiskTier

BEHIND = "the disk is behind with what is to be written"
NOT_SUBMITTED = "its step never came"


class TierRoom(NamedTuple):
    """What there is for blocks beside the arena."""

    num_slots: int  # of RAM
    block_bytes: int
    disk: DiskTier | None = None


class Mover:
    """The tiers beside one KV arena."""

    def __init__(self, backend: Backend, kv: Any, room: TierRoom) -> None:
        """Memory of slots is taken as they are written."""
        self._backend = backend
        self._kv = kv
        self._ram: Bytes = np.zeros((room.num_slots, room.block_bytes), np.uint8)
        self._disk = room.disk
        self._next_id = 0  # all moves before it have been done, or never will be
        self._skipped: set[int] = set()  # those that never will be
        self._results: list[MoveResult] = []
        self._num_taken = 0  # results before those

    def move(self, batch: ScheduledBatch) -> float:
        """Do the moves of a step that were not done. Seconds."""
        start = perf_counter()
        del self._results[: max(0, batch.num_results_taken - self._num_taken)]
        self._num_taken = max(self._num_taken, batch.num_results_taken)
        for move in batch.block_moves:
            if move.move_id in self._skipped:  # its place may have been given to others since
                raise EngineError("a block move came after later ones")
            if move.move_id >= self._next_id:
                self._skip_to(move.move_id)
                self._next_id += 1
                self._do(move)
        if batch.awaits:
            self._skip_to(max(batch.awaits) + 1)
        return perf_counter() - start

    def results(self, awaits: Sequence[int]) -> tuple[MoveResult, ...]:
        """All that were not taken, those of the disk included; if it is to wait, a moment for
        these moves."""
        if self._disk is not None:
            if awaits:
                self._disk.wait(awaits, WAIT_S)
            self._results += self._disk.take_results()
        return tuple(self._results)

    def _skip_to(self, move_id: int) -> None:
        """Steps before may have failed before they came here."""
        for each in range(self._next_id, move_id):
            self._skipped.add(each)
            self._results.append(MoveResult(each, 0, error=NOT_SUBMITTED, was_submitted=False))
        self._next_id = max(self._next_id, move_id)

    def _do(self, move: BlockMove) -> None:
        start = perf_counter()
        match move.source, move.target:
            case "arena", "ram":
                self._ram[list(move.target_blocks)] = self._exported(move)
            case "ram", "arena":
                data = self._ram[list(move.source_blocks)]
                self._backend.import_blocks(self._kv, move.target_blocks, data)
            case _, "disk":
                self._write(move)
                return
            case "disk", "nowhere":
                assert self._disk is not None, "there is no disk"
                self._disk.forget(move)
                return
            case "disk", "ram":
                assert self._disk is not None, "there is no disk"
                self._disk.read(move, [self._ram[slot] for slot in move.target_blocks])
                return
            case _:
                raise AssertionError(f"a move from {move.source} to {move.target}")
        seconds = perf_counter() - start
        self._results.append(MoveResult(move.move_id, len(move.keys), seconds))

    def _write(self, move: BlockMove) -> None:
        """From a copy: the place may be written before the disk has it."""
        assert self._disk is not None, "there is no disk"
        if not self._disk.has_room_for(len(move.keys) * self._ram.shape[1]):
            self._results.append(MoveResult(move.move_id, 0, error=BEHIND))
            return
        if move.source == "ram":
            data = self._ram[list(move.source_blocks)]
        else:
            data = self._exported(move)
        self._disk.write(move, data)

    def _exported(self, move: BlockMove) -> Bytes:
        """Blocks of the arena, without what others have left behind the last token of a text."""
        out = np.empty((len(move.keys), self._ram.shape[1]), np.uint8)
        self._backend.export_blocks(self._kv, move.source_blocks, out, move.num_tokens)
        return out
