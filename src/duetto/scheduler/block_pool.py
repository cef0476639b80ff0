"""Who owns which KV block, and which blocks hold a prefix that others may reuse.

Knows block numbers and hashes; knows no request, no tensor and no policy.

A block is owned (its reference count is the number of block tables that name it) or free. A free
block keeps its contents, and stays findable under its hash, until it is taken again: the least
recently freed first (PagedAttention, Kwon et al., SOSP 2023; the free list as in vLLM V1).
"""

import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

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
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._evicted: OrderedDict[BlockHash, None] = OrderedDict()  # as many as there are blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_free_beside(self, blocks: Sequence[int]) -> int:
        """Free blocks that would be left once `blocks` are retained."""
        return len(self._free) - sum(block in self._free for block in blocks)

    def find(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest published prefix. Changes nothing."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def was_evicted(self, block_hash: BlockHash) -> bool:
        """Whether a block of this hash was there not long ago, and no longer is."""
        return block_hash in self._evicted

    def retain(self, blocks: Sequence[int]) -> None:
        """Add an owner to each block."""
        for block in blocks:
            self._free.pop(block, None)
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take the least recently freed blocks, which forget what they held.

        The caller has asked `num_free` first; too few free blocks is a bug, not a condition.
        """
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._ref_counts[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take an owner from each block; last block first, so a prefix outlives its own tail."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} is released but has no owner"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:  # nothing to find in it: take it first
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable. The first block to hold a prefix stays the one."""
        assert self._ref_counts[block] > 0, f"block {block} is published but has no owner"
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._evicted.pop(block_hash, None)

    def forget_all(self) -> None:
        """Make nothing findable. Owners keep their blocks."""
        for block_hash in self._block_of:
            self._note_eviction(block_hash)
        self._block_of.clear()
        self._hash_of.clear()

    def check(self, block_tables: Sequence[Sequence[int]]) -> None:
        """Assert that every block is free or owned, counts match, and the index is one to one."""
        expected = [0] * self.num_blocks
        for table in block_tables:
            assert len(table) == len(set(table)), f"a block stands twice in one table: {table}"
            for block in table:
                expected[block] += 1
        assert expected == self._ref_counts, "reference counts differ from the number of owners"
        assert set(self._free) == {b for b, n in enumerate(expected) if n == 0}, "free list is off"
        assert self._block_of == {h: b for b, h in self._hash_of.items()}, "index is not one to one"

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            self._note_eviction(block_hash)
            if self._on_evict is not None:
                self._on_evict(block_hash, block)

    def _note_eviction(self, block_hash: BlockHash) -> None:
        self._evicted[block_hash] = None
        if len(self._evicted) > self.num_blocks:
            self._evicted.popitem(last=False)
