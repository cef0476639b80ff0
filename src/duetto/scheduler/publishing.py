"""Making what was computed findable, and telling all who remember it: misses, tiers, and who
listens to events."""

from collections.abc import Sequence

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.scheduler.block_pool import BlockHash, BlockPool
from duetto.scheduler.kv_events import KVEventLog
from duetto.scheduler.misses import HashedTokens, MissMemory, hashed_tokens
from duetto.scheduler.prefix import publish_full_blocks, publish_source
from duetto.scheduler.tiers import Tiers


class Publisher:
    """Of one pool."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, misses: MissMemory, tiers: Tiers
    ) -> None:
        self._config = config
        self._pool = pool
        self._misses = misses
        self._tiers = tiers

    def publish(self, request: Request) -> None:
        """Its full blocks that are written, and exact."""
        num_before = request.num_published_blocks
        publish_full_blocks(request, self._config, self._pool)
        new = slice(num_before, request.num_published_blocks)
        written = range(num_before, request.num_published_blocks)
        for index in written:
            self._misses.learn(hashed_tokens(request), index)
        if self._pool.events is not None:
            self._tell(self._pool.events, hashed_tokens(request), written)
        self._tiers.note_published(
            request.block_hashes[new], request.block_table[new], request.tenant
        )

    def publish_imported(
        self,
        request: Request,
        hashes: Sequence[BlockHash],
        blocks: Sequence[int],
        start: int,
    ) -> None:
        """Blocks of its prompt from `start` on, which another engine has computed."""
        for index in range(start, len(hashes)):
            self._pool.publish(blocks[index], hashes[index])
            self._misses.learn(hashed_tokens(request), index)
        if self._pool.events is not None:
            self._tell(self._pool.events, hashed_tokens(request), range(start, len(hashes)))
        self._tiers.note_published(hashes[start:], blocks[start:], request.tenant)

    def publish_text(self, request: Request, source: Source, end: int) -> None:
        """The first `end` tokens of a text that it reuses are written."""
        new = publish_source(source, end, self._config, self._pool)
        chain = HashedTokens(source.token_ids, source.hashes, request.cache_salt)
        for index in new:
            self._misses.learn(chain, index)
        part, size = slice(new.start, new.stop), self._config.block_size
        num_last = len(source.token_ids) - (new.stop - 1) * size
        self._tiers.note_published(
            source.hashes[part],
            source.blocks[part],
            request.tenant,
            num_last if num_last < size else None,
        )
        if self._pool.events is not None:
            num_full = len(source.token_ids) // size
            self._tell(self._pool.events, chain, range(new.start, min(new.stop, num_full)))

    def _tell(self, events: KVEventLog, chain: HashedTokens, written: range) -> None:
        events.stored(chain.token_ids, chain.hashes, written, is_salted=bool(chain.salt))
