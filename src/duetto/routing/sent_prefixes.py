"""Which worker should have which prefix blocks, where nobody tells: by what was sent there.

A guess: each worker is taken to keep the blocks of the prompts that it was sent, as many as it has,
the least recently used one overwritten first. Knows hashes; no tokens, no sockets.
"""

from collections import OrderedDict
from collections.abc import Sequence

from duetto.routing.prefix_index import PrefixIndex


class SentPrefixes:
    """Of all workers that one router routes to."""

    def __init__(self, max_blocks: int = 4_000_000) -> None:
        self._index = PrefixIndex(max_blocks, max_blocks)
        self._kept: dict[str, OrderedDict[bytes, None]] = {}  # by worker, the oldest first

    def __len__(self) -> int:
        return len(self._index)

    def num_blocks(self, worker: str) -> int:
        return len(self._kept.get(worker, ()))

    def sent(self, worker: str, hashes: Sequence[bytes], num_blocks: int) -> None:
        """A prompt of these blocks goes to a worker that has `num_blocks` in all."""
        kept = self._kept.setdefault(worker, OrderedDict())
        for block_hash in reversed(hashes):  # so that a prefix outlives what goes on from it
            kept[block_hash] = None
            kept.move_to_end(block_hash)
        gone = [kept.popitem(last=False)[0] for _ in range(max(0, len(kept) - num_blocks))]
        self._index.removed(worker, gone)
        self._index.stored(worker, [h for h in hashes if h in kept] if gone else hashes)

    def cached(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """How many of the first blocks each worker should have: of those that have the first."""
        return self._index.cached(hashes)

    def left(self, worker: str) -> None:
        self._kept.pop(worker, None)
        self._index.left(worker)
