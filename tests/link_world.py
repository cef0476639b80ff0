"""Arenas, users of links that remember what they were told, and waits."""

import time
from collections.abc import Callable
from threading import Condition
from typing import Any

import numpy as np

from duetto.cluster.links.link import BlockRows, LinkEnd, RowsSent

PATIENCE_S = 20.0  # machines of tests are slow


def wait_until(what: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def blocks_of(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


def random_rows(seed: int, num_blocks: int, sizes: tuple[int, ...], sent: int) -> BlockRows:
    """An arena of random bytes, and which of its blocks, in any order."""
    random = np.random.default_rng(seed)
    arrays = [random.integers(0, 256, (num_blocks, size), np.uint8) for size in sizes]
    return BlockRows(arrays, random.permutation(num_blocks)[:sent].astype(np.int32))


def empty_like(rows: BlockRows, num_blocks: int, seed: int = 0) -> BlockRows:
    """Places for as many blocks in another arena, of zeros."""
    order = np.random.default_rng(seed).permutation(num_blocks)[: len(rows.blocks)]
    arrays = [np.zeros((num_blocks, array.shape[1]), np.uint8) for array in rows.arrays]
    return BlockRows(arrays, order.astype(np.int32))


def bytes_in(rows: BlockRows) -> bytes:
    return b"".join(array[block].tobytes() for block in rows.blocks for array in rows.arrays)


class World:
    """A user of one end. Rows of (transfer, layer) go to where `expected` says."""

    def __init__(self) -> None:
        self.expected: dict[tuple[int, int], BlockRows] = {}
        self.told: list[Any] = []  # in order: frames, RowsSent, and why the link was lost
        self.asked: list[RowsSent] = []
        self.changed = Condition()
        self.on_frame: Callable[[bytes], None] | None = None
        self.is_inside = False

    def received(self, frame: bytes) -> None:
        self._tell(frame)
        if self.on_frame is not None:
            self.on_frame(frame)

    def places(self, rows: RowsSent) -> BlockRows | None:
        assert not self.is_inside
        self.asked.append(rows)
        whole = self.expected.get((rows.transfer_id, rows.layer))
        return None if whole is None else whole.part(rows.first, rows.num_blocks)

    def arrived(self, rows: RowsSent) -> None:
        self._tell(rows)

    def lost(self, reason: str) -> None:
        self._tell(reason)

    def _tell(self, what: Any) -> None:
        assert not self.is_inside, "two calls at a time"
        self.is_inside = True
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()
        self.is_inside = False

    def wait_for(self, what: Callable[[list[Any]], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: what(self.told), PATIENCE_S), self.told[-3:]

    def frames(self) -> list[bytes]:
        return [one for one in self.told if isinstance(one, bytes)]

    def reasons(self) -> list[str]:
        return [one for one in self.told if isinstance(one, str)]

    def num_arrived(self, transfer_id: int) -> int:
        rows = [one for one in self.told if isinstance(one, RowsSent)]
        return sum(one.num_blocks for one in rows if one.transfer_id == transfer_id)


def send_all(link: LinkEnd, transfer_id: int, layer: int, data: BlockRows) -> None:
    link.send_rows(RowsSent(transfer_id, layer, 0, len(data.blocks)), data)
