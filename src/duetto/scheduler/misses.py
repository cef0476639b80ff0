"""Why the prefix cache did not have what a prompt begins with. Changes nothing that is scheduled.

Remembers a bounded part of what was published; what is older than that counts as never seen.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from duetto.core.cache_miss import CacheMiss, MissReason
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.scheduler.block_pool import BlockHash, BlockPool, root_hash
from duetto.scheduler.prefix import reusable_hashes

MAX_REMEMBERED = 4096  # blocks; about a megabyte


class MissMemory:
    """What was published of late: after each prefix, the block that last went on from it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._next_of: OrderedDict[BlockHash, bytes] = OrderedDict()  # parent -> token ids
        self._root_of: OrderedDict[bytes, BlockHash] = OrderedDict()  # first block -> its root

    def learn(self, request: Request, index: int) -> None:
        """Block `index` of a request has been published."""
        block = self._block(request, index)
        parent = self._parent(request, index)
        _remember(self._next_of, parent, block)
        if index == 0:
            _remember(self._root_of, block, parent)

    def explain(self, request: Request, num_found: int, pool: BlockPool) -> CacheMiss | None:
        """Why no more than `num_found` blocks were there; None if no more could be."""
        if not self._config.enable_prefix_caching:
            return CacheMiss(MissReason.OFF, 0)
        if request.sampling.prompt_logprobs is not None:
            return CacheMiss(MissReason.SCORED, 0)
        hashes = reusable_hashes(request, self._config)
        if not hashes:
            return CacheMiss(MissReason.TOO_SHORT, 0)
        if num_found == len(hashes):
            return None
        return self._explain_block(request, num_found, pool.was_evicted(hashes[num_found]))

    def _explain_block(self, request: Request, index: int, was_evicted: bool) -> CacheMiss:
        start = index * self._config.block_size
        block, parent = self._block(request, index), self._parent(request, index)
        other = self._next_of.get(parent)
        if was_evicted or other == block:
            return CacheMiss(MissReason.EVICTED, start)
        differs_at = None
        if other is not None:
            differs_at = start + _first_difference(_ids(block), _ids(other)) or None  # 0: unlike
        if index == 0 and self._root_of.get(block, parent) != parent:
            return CacheMiss(MissReason.OTHER_SALT, start, differs_at)
        if differs_at is not None:
            return CacheMiss(MissReason.DIFFERS, start, differs_at)
        return CacheMiss(MissReason.NEVER_SEEN, start)

    def _block(self, request: Request, index: int) -> bytes:
        size = self._config.block_size
        return array("q", request.token_ids[index * size : (index + 1) * size]).tobytes()

    def _parent(self, request: Request, index: int) -> BlockHash:
        if index:
            return request.block_hashes[index - 1]
        return root_hash(self._config.cache_namespace, request.cache_salt)


def _remember(table: OrderedDict[bytes, bytes], key: bytes, value: bytes) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def _ids(block: bytes) -> Sequence[int]:
    return array("q", block)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
