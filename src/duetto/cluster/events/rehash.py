"""Events of workers whose hashes are not ours, such as vLLM's: their blocks are hashed again from
their tokens, as our router hashes a prompt.

What depends on more than tokens (a salt, LoRA, images) and what follows a block that is not known
is passed over, and so are blocks of another size.
"""

from collections.abc import Sequence
from typing import NamedTuple

from duetto.cluster.events.stream import BlockIndex
from duetto.scheduler.block_pool import next_hash, root_hash
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

MAX_KNOWN = 1_000_000  # blocks of one worker


class HashedAs(NamedTuple):
    """How the router hashes a prompt."""

    namespace: bytes
    block_size: int
    salt: bytes = b""


class RehashingSink:
    """Takes the events of one worker."""

    def __init__(
        self, worker: str, index: BlockIndex, ours: HashedAs, max_known: int = MAX_KNOWN
    ) -> None:
        self._worker = worker
        self._index = index
        self._ours = ours
        self._max_known = max_known
        self._root = root_hash(ours.namespace, ours.salt)
        self._ours_of: dict[bytes, bytes] = {}  # by their hash
        self.num_passed_over = 0  # blocks

    def take(self, events: Sequence[KVEvent]) -> None:
        for event in events:
            match event:
                case BlocksStored():
                    self._index.stored(self._worker, self._hashed(event))
                case BlocksRemoved(hashes):
                    gone = [self._ours_of.pop(block_hash, None) for block_hash in hashes]
                    self._index.removed(self._worker, [one for one in gone if one is not None])
                case BlocksCleared():
                    self._ours_of.clear()
                    self._index.cleared(self._worker)

    def _hashed(self, event: BlocksStored) -> list[bytes]:
        size = self._ours.block_size
        before = self._root if event.parent is None else self._ours_of.get(event.parent)
        is_whole = len(event.token_ids) == size * len(event.hashes)
        hashes: list[bytes] = []
        if before is not None and is_whole and event.block_size == size and not event.is_salted:
            room = self._max_known - len(self._ours_of)
            for index, theirs in enumerate(event.hashes[: max(0, room)]):
                before = next_hash(before, event.token_ids[index * size : (index + 1) * size])
                self._ours_of[theirs] = before
                hashes.append(before)
        self.num_passed_over += len(event.hashes) - len(hashes)
        return hashes
