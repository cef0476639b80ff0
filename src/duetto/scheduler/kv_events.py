"""What changed in the blocks that a pool has published, for who routes by it. Knows no sockets.

Told are the full blocks of prefixes, a marked text's own too: they are those of a prompt that
begins with it. Not told is a text's last block that is not full, since no prefix has it, nor what
lies in another tier: a block that leaves the arena is removed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

MAX_WAITING = 8192  # hashes; then they are handed on although the step has not ended


class BlocksStored(NamedTuple):
    """Blocks one after the other in a chain are published."""

    hashes: tuple[bytes, ...]
    parent: bytes | None  # of the block before the first; None: it begins a prompt
    token_ids: tuple[int, ...]  # of all of them
    block_size: int
    is_salted: bool  # others than its tenant never find them


class BlocksRemoved(NamedTuple):
    hashes: tuple[bytes, ...]


class BlocksCleared(NamedTuple):
    """All of them are gone."""


KVEvent = BlocksStored | BlocksRemoved | BlocksCleared
TakeEvents = Callable[[Sequence[KVEvent]], None]  # must not block


class KVEventLog:
    """What happened since it was handed on, in order. Of one pool, from its beginning."""

    def __init__(self, block_size: int, take: TakeEvents, max_waiting: int = MAX_WAITING) -> None:
        self._block_size = block_size
        self._take = take
        self._max_waiting = max_waiting
        self._events: list[KVEvent] = []
        self._removed: list[bytes] = []  # the last event, which may grow
        self._num_waiting = 0
        self._told: dict[bytes, None] = {}  # the oldest first; as many as are published

    def published(self) -> tuple[bytes, ...]:
        """All that is there, once all events are handed on: for who has missed some."""
        return tuple(self._told)

    def stored(
        self,
        token_ids: Sequence[int],
        hashes: Sequence[bytes],
        published: Sequence[int],
        *,
        is_salted: bool,
    ) -> None:
        """These blocks of a chain are published; those that were before are not told again."""
        run: list[int] = []
        for index in published:
            if hashes[index] in self._told:
                continue
            self._told[hashes[index]] = None
            if run and index != run[-1] + 1:
                self._add_run(token_ids, hashes, range(run[0], run[-1] + 1), is_salted)
                run = []
            run.append(index)
        if run:
            self._add_run(token_ids, hashes, range(run[0], run[-1] + 1), is_salted)

    def removed(self, block_hash: bytes) -> None:
        if block_hash in self._told:
            del self._told[block_hash]
            self._removed.append(block_hash)
            self._count(1)

    def cleared(self) -> None:
        """What waits is of no interest any more."""
        self._told.clear()
        self._removed.clear()
        self._events = [BlocksCleared()]
        self._num_waiting = 1

    def hand_on(self) -> None:
        """A step has ended, or something was dropped between two."""
        self._close()
        if self._events:
            events, self._events, self._num_waiting = self._events, [], 0
            self._take(events)

    def _add_run(
        self, token_ids: Sequence[int], hashes: Sequence[bytes], run: range, is_salted: bool
    ) -> None:
        self._close()
        size = self._block_size
        self._events.append(
            BlocksStored(
                tuple(hashes[run.start : run.stop]),
                hashes[run.start - 1] if run.start else None,
                tuple(token_ids[run.start * size : run.stop * size]),
                size,
                is_salted,
            )
        )
        self._count(len(run))

    def _close(self) -> None:
        if self._removed:
            self._events.append(BlocksRemoved(tuple(self._removed)))
            self._removed.clear()

    def _count(self, count: int) -> None:
        self._num_waiting += count
        if self._num_waiting >= self._max_waiting:
            self.hand_on()
