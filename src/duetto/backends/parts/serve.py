"""A part's own process: does what the engine's process orders, one after the other, until it ends.

Knows no checkpoint; who starts it brings the part.
"""

import os
import select
import socket
from collections.abc import Callable
from threading import Event, Thread
from time import perf_counter_ns
from typing import Any

import numpy as np

from duetto.backends.backend import FloatArray
from duetto.backends.parts.board import Board
from duetto.backends.parts.messages import (
    AllocateKV,
    ExportBlocks,
    Failure,
    FreeKV,
    ImportBlocks,
    MoveKV,
    OrderDone,
    OrderFailed,
    PartChannel,
    PartOrder,
    ReadKV,
    RunStep,
    StartPart,
    ToPart,
    as_ints,
    kv_moves_of,
    step_arrays_of,
)
from duetto.backends.parts.part import ModelPart
from duetto.backends.parts.rows import RowsMemory
from duetto.backends.parts.wiring import NeighbourGone, StageLink, StageSkipped, Wiring
from duetto.core.errors import ConfigError, DeviceLost
from duetto.program.op import Ref
from duetto.program.program import Program

_ASKED = "the group of ranks was ended"  # as csrc/group.cpp says it, to all but who ended it


def end_with(sock: socket.socket) -> None:
    """End this process as soon as the other one has closed its end, or has ended: also while a
    step is computed, or while it waits for a part that hangs."""

    def watch() -> None:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        while not poll.poll():
            pass
        os._exit(0)

    Thread(target=watch, name="duetto-part-watch", daemon=True).start()


class PartServer:
    """Belongs to one thread."""

    def __init__(
        self,
        wiring: Wiring,
        program: Program,
        part: ModelPart,
        end_group: Callable[[], None] | None,
    ) -> None:
        """`end_group` frees other ranks, which may wait for this one; None: there are none."""
        self._index, self._part, self._end_group = wiring.index, part, end_group
        self._board = Board(wiring.board)
        self._before = _link(wiring.before, program.inputs)
        self._behind = _link(wiring.behind, program.outputs)
        self._results: RowsMemory | None = None
        if wiring.results is not None:
            self._results = RowsMemory(wiring.results, [program.logits.width])
        self._kv: dict[int, Any] = {}
        self._busy_ns = 0

    def serve(self, channel: "PartChannel[ToPart]") -> None:
        """Until the other side closes."""
        while True:
            try:
                order = channel.receive()
            except (EOFError, OSError):
                return
            assert not isinstance(order, StartPart)
            self._busy_ns = 0
            answer: OrderDone | OrderFailed | None = None
            try:
                answer = self._done(order)
            except Exception as error:
                if isinstance(error, NeighbourGone) or str(error) == _ASKED:
                    Event().wait()  # the engine hears who is gone, and ends this part too
                answer = self._failed(order, error)
            self._board.done(self._index, order.order, self._busy_ns)
            if answer is not None:
                channel.send(answer)

    def _failed(self, order: PartOrder, error: Exception) -> OrderFailed:
        failure = failure_of(error)
        text = f"{type(error).__name__}: {error}" if failure == "other" else str(error)
        if failure == "other" and self._end_group is not None:
            self._end_group()  # the rest, all ranks find alike
            failure = "lost"
        return OrderFailed(order.order, failure, text)

    def _done(self, order: PartOrder) -> OrderDone | None:
        match order:
            case RunStep():
                return self._run(order)
            case AllocateKV(number, kv, num_blocks, block_size, dtype):
                arena = self._kv[kv] = self._part.allocate_kv(num_blocks, block_size, dtype)
                return OrderDone(number, number=self._part.block_bytes(arena))
            case FreeKV(_, kv):
                self._kv.pop(kv, None)
                self._forget(kv)
                return None
            case MoveKV(number, kv):
                self._part.move_kv(kv_moves_of(order), self._kv[kv])
                return OrderDone(number)
            case ReadKV(number, kv, layer, slots):
                keys, values = self._part.read_kv(layer, as_ints(slots), self._kv[kv])
                return OrderDone(number, keys.tobytes() + values.tobytes(), keys.shape[1])
            case ExportBlocks(number, kv, blocks, num_tokens):
                arena = self._kv[kv]
                out = np.empty((len(blocks), self._part.block_bytes(arena)), np.uint8)
                self._part.export_blocks(arena, blocks, out, num_tokens)
                return OrderDone(number, out.tobytes())
            case ImportBlocks(number, kv, blocks, data):
                rows = np.frombuffer(data, np.uint8).reshape(len(blocks), -1)
                self._part.import_blocks(self._kv[kv], blocks, rows)
                return OrderDone(number)

    def _run(self, order: RunStep) -> OrderDone | None:
        try:
            results = self._computed(order)
        except Exception:
            if self._behind is not None:
                self._behind.skip(order.order)
            raise
        if self._behind is not None:
            self._behind.send(order.order, order.kv, results)
        if self._results is None:
            return None
        return OrderDone(order.order, number=self._results.write(order.kv, results))

    def _computed(self, order: RunStep) -> list[FloatArray]:
        step, inputs = step_arrays_of(order), list[FloatArray]()
        if self._before is not None:  # first: a note that is not read would be the next step's
            inputs = self._before.receive(order.order, order.kv, len(step.token_ids))
        start = perf_counter_ns()
        try:
            return self._part.run_stage(step, self._kv[order.kv], inputs)
        finally:
            self._busy_ns = perf_counter_ns() - start

    def _forget(self, kv: int) -> None:
        for link in (self._before, self._behind):
            if link is not None:
                link.rows.forget(kv)
        if self._results is not None:
            self._results.forget(kv)


def failure_of(error: Exception) -> Failure:
    match error:
        case ConfigError():
            return "config"
        case MemoryError():
            return "memory"
        case StageSkipped():
            return "skipped"
        case DeviceLost():
            return "lost"
        case RuntimeError() if type(error).__name__ == "GroupEnded":  # native: it may not be there
            return "lost"
        case ValueError() | AssertionError() | IndexError():
            return "value"
    return "other"


def _link(pair: tuple[int, int] | None, refs: tuple[Ref, ...]) -> StageLink | None:
    if pair is None:
        return None
    descriptor, rows = pair
    widths = [ref.width for ref in refs]
    return StageLink(socket.socket(fileno=descriptor), RowsMemory(rows, widths))
