"""Who owns which KV block, and which blocks hold a prefix that others may reuse.

Knows block numbers and hashes; knows no request, no tensor and no policy.

A block is owned (its reference count is the number of block tables that name it), kept or free. A
free block keeps its contents, and stays findable under its hash, until it is taken again: the
lowest priority first, then the least recently freed (PagedAttention, Kwon et al., SOSP 2023; the
free list as in vLLM V1). A kept block has no owner either, but its hash is pinned: it is not taken.
Who pins what, and for how long, is retention.py's.
"""

import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from duetto.core.cache_control import DEFAULT_PRIORITY, MAX_PRIORITY, CacheCounts, EvictionReason
from duetto.scheduler.free_blocks import EMPTY, OVER, FreeBlocks
from duetto.scheduler.kv_events import KVEventLog

PINNED = MAX_PRIORITY + 1  # a level above every priority
BlockHash = bytes


def root_hash(namespace: bytes, salt: bytes) -> BlockHash:
    """Where a chain of block hashes begins. Different namespaces or salts share nothing."""
    fields = (b"duetto/kv/1", namespace, salt)
    return hashlib.sha256(b"".join(struct.pack("<Q", len(f)) + f for f in fields)).digest()


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block: equal means equal tokens here and in every block before it."""
    ids = array("q", token_ids).tobytes()
    return hashlib.sha256(parent + struct.pack("<Q", len(ids)) + ids).digest()


class BlockPool:
    """Reference-counted KV blocks with an index of published prefixes."""

    def __init__(
        self, num_blocks: int, on_evict: Callable[[BlockHash, int], None] | None = None
    ) -> None:
        """`on_evict` is told of a published block before somebody else gets it."""
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._ref_counts = [0] * num_blocks
        self._free = FreeBlocks(range(num_blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()  # without an owner, but pinned
        self._level_of: dict[BlockHash, int] = {}  # a priority or PINNED, where it was chosen
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        # As many as there are blocks.
        self._evicted: OrderedDict[BlockHash, EvictionReason] = OrderedDict()
        self._num_evicted = dict.fromkeys(EvictionReason, 0)
        self.events: KVEventLog | None = None  # who listens is told from here on

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_free_beside(self, blocks: Sequence[int]) -> int:
        """Free blocks that would be left once `blocks` are retained."""
        return len(self._free) - sum(block in self._free for block in blocks)

    @property
    def counts(self) -> CacheCounts:
        room, ttl, dropped, quota = self._num_evicted.values()
        return CacheCounts(room, ttl, dropped, quota, len(self._kept))

    def find(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest published prefix. Changes nothing."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def why_evicted(self, block_hash: BlockHash) -> EvictionReason | None:
        """Why a block of this hash, which was there not long ago, no longer is."""
        return self._evicted.get(block_hash)

    def retain(self, blocks: Sequence[int]) -> None:
        """Add an owner to each block."""
        for block in blocks:
            self._free.discard(block)
            self._kept.pop(block, None)
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take the next free blocks, which forget what they held.

        The caller has asked `num_free` first; too few free blocks is a bug, not a condition.
        """
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, level = self._free.take()
            self._forget(block, EvictionReason.TTL if level == OVER else EvictionReason.ROOM)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take an owner from each block; last block first, so a prefix outlives its own tail."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} is released but has no owner"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._let_go(block)

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable. The first block to hold a prefix stays the one."""
        assert self._ref_counts[block] > 0, f"block {block} is published but has no owner"
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._evicted.pop(block_hash, None)

    def forget_all(self) -> None:
        """Make nothing findable. Owners keep their blocks; what is pinned is kept again once it is
        computed again."""
        for block in [*self._free, *self._kept]:  # in the order in which they would be taken
            if block in self._hash_of:
                self._empty(block)
        for block_hash in self._block_of:
            self._note_eviction(block_hash, EvictionReason.DROPPED)
        self._block_of.clear()
        self._hash_of.clear()
        if self.events is not None:
            self.events.cleared()

    # --- what users of the cache control -----------------------------------------------------

    def level(self, block_hash: BlockHash) -> int:
        """The priority of a hash's block, there or not; or PINNED."""
        return self._level_of.get(block_hash, DEFAULT_PRIORITY)

    def set_level(self, block_hash: BlockHash, level: int | None, *, is_over: bool = False) -> None:
        """Choose a hash's priority, or PINNED; None: as those of which nothing was said.

        Its block counts as used now; or, if its time `is_over` and nobody uses it, goes first.
        """
        if level is None:
            self._level_of.pop(block_hash, None)
        else:
            self._level_of[block_hash] = level
        block = self._block_of.get(block_hash)
        if block is not None and not self._ref_counts[block]:
            self._free.discard(block)
            self._kept.pop(block, None)
            if is_over and level is None:
                self._free.add(block, OVER)
            else:
                self._let_go(block)

    def drop(self, block_hash: BlockHash) -> bool | None:
        """Make a hash's block unfindable; it is free at once, or when its owners are done.

        Returns whether it has owners; None if it was not there.
        """
        block = self._block_of.get(block_hash)
        if block is None:
            return None
        is_owned = self._ref_counts[block] > 0
        if not is_owned:
            self._empty(block)
        self._forget(block, EvictionReason.DROPPED)
        return is_owned

    def note_dropped(self, block_hash: BlockHash) -> None:
        """It was dropped where else it was: that is why it is no longer there, whatever was why it
        left this pool."""
        self._remember(block_hash, EvictionReason.DROPPED)

    def give_way(self, count: int, beside: Collection[int]) -> None:
        """Evict so many pinned blocks, not those `beside`, the least recently kept first: a request
        needs them that could not run otherwise. They are kept again once computed again."""
        others = [block for block in self._kept if block not in beside]
        for block in others[: max(0, count)]:
            self._empty(block)
            self._forget(block, EvictionReason.QUOTA)

    def check(self, block_tables: Sequence[Sequence[int]]) -> None:
        """Assert that every block is free or owned, counts match, and the index is one to one."""
        expected = [0] * self.num_blocks
        for table in block_tables:
            assert len(table) == len(set(table)), f"a block stands twice in one table: {table}"
            for block in table:
                expected[block] += 1
        assert expected == self._ref_counts, "reference counts differ from the number of owners"
        unowned = {b for b, n in enumerate(expected) if n == 0}
        kept = {b for b in unowned if self._is_pinned(b)}
        assert set(self._kept) == kept, "a pinned block is free, or one that is not is kept"
        assert set(self._free) == unowned - kept, "free list is off"
        assert len(list(self._free)) == len(self._free), "a block is free twice"
        for block in self._free:
            held = self._hash_of.get(block)
            wanted = {EMPTY} if held is None else {self.level(held), OVER}
            assert self._free.level(block) in wanted, "a free block waits at a wrong level"
        assert self._block_of == {h: b for b, h in self._hash_of.items()}, "index is not one to one"

    def _is_pinned(self, block: int) -> bool:
        block_hash = self._hash_of.get(block)
        return block_hash is not None and self._level_of.get(block_hash) == PINNED

    def _let_go(self, block: int) -> None:
        """A block has no owner: it is free, or kept."""
        block_hash = self._hash_of.get(block)
        if block_hash is None:  # nothing to find in it: take it first
            self._free.add(block, EMPTY, is_next=True)
            return
        level = self._level_of.get(block_hash, DEFAULT_PRIORITY)
        if level == PINNED:
            self._kept[block] = None
        else:
            self._free.add(block, level)

    def _empty(self, block: int) -> None:
        """A block without an owner holds nothing any more."""
        self._free.discard(block)
        self._kept.pop(block, None)
        self._free.add(block, EMPTY)

    def _forget(self, block: int, reason: EvictionReason) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            self._note_eviction(block_hash, reason)
            if self.events is not None:
                self.events.removed(block_hash)
            if self._on_evict is not None and reason is not EvictionReason.DROPPED:
                self._on_evict(block_hash, block)

    def _note_eviction(self, block_hash: BlockHash, reason: EvictionReason) -> None:
        self._num_evicted[reason] += 1
        self._remember(block_hash, reason)

    def _remember(self, block_hash: BlockHash, reason: EvictionReason) -> None:
        self._evicted[block_hash] = reason
        if len(self._evicted) > self.num_blocks:
            self._evicted.popitem(last=False)
