"""Which worker has which prefix blocks, as its KV events say. Knows hashes; no tokens, no sockets.
Any thread may call: events come on another one than requests.

A guess about workers, never a promise. It is one dict from a block's hash to a set of workers, and
the set is an int with a bit per worker: blocks are found for all workers at once, and one shared
by a thousand costs 160 bytes more than one that a single worker has. Equal sets are one object.

A worker that left, or whose cache was reset, loses its bit at once, and the entries that name it
are swept a few at a time, so no call takes long.
"""

from collections.abc import Iterator, Sequence
from threading import RLock

_MAX_SHARED_SETS = 4096  # how many sets of workers are remembered to be one object
_MAX_NAMED_SETS = 256
_SWEPT_PER_CALL = 256


class PrefixIndex:
    """Of all workers that one router routes to."""

    def __init__(self, max_blocks: int = 4_000_000, max_blocks_per_worker: int = 1_000_000) -> None:
        """More blocks than that are not indexed: those that are known stay."""
        self._max_blocks = max_blocks
        self._max_per_worker = max_blocks_per_worker
        self._lock = RLock()  # guards all below
        self._bit_of: dict[str, int] = {}  # an int with one bit
        self._workers: list[str | None] = []  # by the bit's number; None: no longer, or not yet
        self._counts: list[int] = []  # by the bit's number
        self._holders: dict[bytes, int] = {}
        self._shared: dict[int, int] = {}
        self._names: dict[int, tuple[str, ...]] = {}  # of sets, while workers are the same
        self._live = 0  # bits of workers
        self._gone = 0  # bits that entries may still have, and that are nobody's
        self._sweep: Iterator[bytes] | None = None
        self._swept = 0  # the bits that are swept now

    def __len__(self) -> int:
        """How many entries there are, those included that are to be swept."""
        return len(self._holders)

    def num_blocks(self, worker: str) -> int:
        """How many blocks it is known to have."""
        with self._lock:
            bit = self._bit_of.get(worker)
            return 0 if bit is None else self._counts[bit.bit_length() - 1]

    def stored(self, worker: str, hashes: Sequence[bytes]) -> int:
        """A worker has these blocks now. How many of them are not indexed, for there are too
        many."""
        with self._lock:
            self._sweep_some(len(hashes))
            bit = self._bit_of.get(worker) or self._add(worker)
            number = bit.bit_length() - 1
            holders, count, refused = self._holders, self._counts[number], 0
            for block_hash in hashes:
                mask = holders.get(block_hash, 0)
                if mask & bit:
                    continue
                if count >= self._max_per_worker or (not mask and len(holders) >= self._max_blocks):
                    refused += 1
                    continue
                holders[block_hash] = bit if not mask else self._share(mask | bit)
                count += 1
            self._counts[number] = count
            return refused

    def removed(self, worker: str, hashes: Sequence[bytes]) -> None:
        """It no longer has these. What it was not known to have is left alone."""
        with self._lock:
            bit = self._bit_of.get(worker)
            if bit is None:
                return
            holders, count = self._holders, 0
            for block_hash in hashes:
                mask = holders.get(block_hash, 0)
                if mask & bit:
                    self._set(block_hash, mask ^ bit)
                    count += 1
            self._counts[bit.bit_length() - 1] -= count

    def cleared(self, worker: str) -> None:
        """It has nothing."""
        with self._lock:
            if self.num_blocks(worker):
                self.left(worker)

    def left(self, worker: str) -> None:
        """It is no worker any more."""
        with self._lock:
            bit = self._bit_of.pop(worker, None)
            if bit is not None:
                self._workers[bit.bit_length() - 1] = None
                self._names.clear()
                self._live ^= bit
                self._gone |= bit
                self._sweep_some(0)

    def cached(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """How many of the first blocks each worker has: of those that have the first one."""
        with self._lock:
            counts: dict[str, int] = {}
            having = 0
            for index, block_hash in enumerate(hashes):
                mask = self._holders.get(block_hash, 0)
                if mask == having:
                    continue
                still = mask & (having if index else self._live)
                if still != having:
                    counts.update(dict.fromkeys(self._of(having & ~still), index))
                    having = still
                if not having:
                    return counts
            counts.update(dict.fromkeys(self._of(having), len(hashes)))
            return counts

    def holding(self, worker: str) -> set[bytes]:
        """All blocks of a worker: this looks at every entry."""
        with self._lock:
            bit = self._bit_of.get(worker, 0)
            return {block_hash for block_hash, mask in self._holders.items() if mask & bit}

    def _add(self, worker: str) -> int:
        """A bit for a worker: one that is in no entry."""
        free = ~(self._live | self._gone)
        bit = free & -free
        if bit.bit_length() > len(self._workers):
            self._workers.append(None)
            self._counts.append(0)
        self._workers[bit.bit_length() - 1] = worker
        self._counts[bit.bit_length() - 1] = 0
        self._bit_of[worker] = bit
        self._names.clear()
        self._live |= bit
        return bit

    def _of(self, mask: int) -> tuple[str, ...]:
        """Those of a set. Few sets are asked for again and again: what most workers have."""
        names = self._names.get(mask)
        if names is None:
            if len(self._names) >= _MAX_NAMED_SETS:
                self._names.clear()
            names = self._names[mask] = tuple(self._named(mask))
        return names

    def _named(self, mask: int) -> Iterator[str]:
        # Most masks have few bits of many: look at bytes that are not 0.
        for index, byte in enumerate(mask.to_bytes((mask.bit_length() + 7) // 8, "little")):
            while byte:
                low = byte & -byte
                byte ^= low
                worker = self._workers[8 * index + low.bit_length() - 1]
                assert worker is not None
                yield worker

    def _set(self, block_hash: bytes, mask: int) -> None:
        if mask:
            self._holders[block_hash] = self._share(mask)
        else:
            del self._holders[block_hash]

    def _share(self, mask: int) -> int:
        """The same set, as the one object that entries share."""
        if len(self._shared) >= _MAX_SHARED_SETS:
            self._shared.clear()
        return self._shared.setdefault(mask, mask)

    def _sweep_some(self, beside: int) -> None:
        """Look at some entries, for bits that are nobody's: more than are added beside it."""
        if not self._gone:
            return
        if self._sweep is None:
            self._swept = self._gone
            self._sweep = iter(list(self._holders))
        for _ in range(_SWEPT_PER_CALL + 2 * beside):
            block_hash = next(self._sweep, None)
            if block_hash is None:
                self._gone ^= self._swept  # these bits may be given away again
                self._sweep = None
                return
            mask = self._holders.get(block_hash, 0)
            if mask & self._swept:
                self._set(block_hash, mask & ~self._swept)
