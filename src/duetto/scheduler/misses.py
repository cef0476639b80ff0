"""Why the prefix cache did not have what a prompt, or a segment of it, begins with. Changes nothing
that is scheduled.

Remembers a bounded part of what was published; what is older than that counts as never seen.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from duetto.core.cache_control import EvictionReason
from duetto.core.cache_miss import CacheMiss, MissReason, SegmentHit
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.scheduler.block_pool import BlockHash, BlockPool, root_hash
from duetto.scheduler.prefix import reusable_hashes

MAX_REMEMBERED = 4096  # blocks; about a megabyte


class HashedTokens(NamedTuple):
    """Tokens that are kept block by block: a request's, or a text's."""

    token_ids: Sequence[int]
    hashes: Sequence[BlockHash]
    salt: bytes


def hashed_tokens(request: Request) -> HashedTokens:
    return HashedTokens(request.token_ids, request.block_hashes, request.cache_salt)


class MissMemory:
    """What was published of late: after each prefix, the block that last went on from it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._next_of: OrderedDict[BlockHash, bytes] = OrderedDict()  # parent -> token ids
        self._root_of: OrderedDict[bytes, BlockHash] = OrderedDict()  # first block -> its root

    def learn(self, chain: HashedTokens, index: int) -> None:
        """Block `index` of a chain has been published."""
        block = self._block(chain, index)
        parent = self._parent(chain, index)
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
        evicted = pool.why_evicted(hashes[num_found])
        return self._explain_block(hashed_tokens(request), num_found, evicted)

    def explain_segments(self, request: Request, pool: BlockPool) -> tuple[SegmentHit, ...]:
        """What is there of each segment of a request that has just been admitted."""
        segments = () if request.reuse is None else request.reuse.segments
        return tuple([self._explain_segment(request, *segment, pool) for segment in segments])

    def _explain_segment(
        self, request: Request, start: int, end: int, pool: BlockPool
    ) -> SegmentHit:
        source = next((source for source in request.sources if start in source.places), None)
        if source is None:
            reason = MissReason.ALL_COMPUTED if start else MissReason.AT_START
            return SegmentHit(start, end, 0, reason)
        if not source.num_left:
            return SegmentHit(start, end, end - start)
        miss = self._explain_source(source, request.cache_salt, pool)
        return SegmentHit(start, end, source.num_computed, miss.reason, miss.differs_at)

    def _explain_source(self, source: Source, salt: bytes, pool: BlockPool) -> CacheMiss:
        """Why a text is not all there."""
        index = source.num_computed // self._config.block_size
        chain = HashedTokens(source.token_ids, source.hashes, salt)
        return self._explain_block(chain, index, pool.why_evicted(source.hashes[index]))

    def _explain_block(
        self, chain: HashedTokens, index: int, evicted: EvictionReason | None
    ) -> CacheMiss:
        start = index * self._config.block_size
        block, parent = self._block(chain, index), self._parent(chain, index)
        other = self._next_of.get(parent)
        if evicted is EvictionReason.DROPPED:
            return CacheMiss(MissReason.DROPPED, start)
        if evicted is not None or other == block:
            return CacheMiss(MissReason.EVICTED, start)
        differs_at = None
        if other is not None:
            differs_at = start + _first_difference(_ids(block), _ids(other)) or None  # 0: unlike
        if index == 0 and self._root_of.get(block, parent) != parent:
            return CacheMiss(MissReason.OTHER_SALT, start, differs_at)
        if differs_at is not None:
            return CacheMiss(MissReason.DIFFERS, start, differs_at)
        return CacheMiss(MissReason.NEVER_SEEN, start)

    def _block(self, chain: HashedTokens, index: int) -> bytes:
        size = self._config.block_size
        return array("q", chain.token_ids[index * size : (index + 1) * size]).tobytes()

    def _parent(self, chain: HashedTokens, index: int) -> BlockHash:
        if index:
            return chain.hashes[index - 1]
        return root_hash(self._config.cache_namespace, chain.salt)


def _remember(table: OrderedDict[bytes, bytes], key: bytes, value: bytes) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def _ids(block: bytes) -> Sequence[int]:
    return array("q", block)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first token that differs, or that only one of the two has."""
    shorter = min(len(a), len(b))  # a text's last block need not be full
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
