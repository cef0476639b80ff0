"""Which blocks a running request holds, and who loses them when they run out.

Knows block numbers and counts of tokens. Knows no budget, and not who is admitted.
"""

from collections.abc import Sequence

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.scheduler.block_pool import BlockPool
from duetto.scheduler.choice import begin
from duetto.scheduler.counts import SchedulerCounts
from duetto.scheduler.queues import Queues


class Room:
    """The writer of block tables, and of what a preemption takes. Drafts alone add blocks of their
    own (speculate.py), which `trim` takes back."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, queues: Queues, counts: SchedulerCounts
    ) -> None:
        self._config = config
        self._pool = pool
        self._queues = queues
        self._counts = counts

    def make(self) -> int:
        """Give every running request blocks for all its tokens, oldest first; preempt the newest.

        Returns how many were preempted. A running request that is left holds room for all the
        tokens it has, whether or not this step's budget reaches it.
        """
        num_before = self._counts.num_preemptions
        size, running = self._config.block_size, self._queues.running
        growing = [
            r
            for r in running.values()
            if len(r.block_table) * size < len(r.token_ids) + r.num_pending_tokens
        ]
        for request in sorted(growing, key=self._queues.place):
            while request.request_id in running:
                missing = max(0, self.num_to_hold(request) - len(request.block_table))
                if missing <= self._pool.num_free:
                    request.block_table += self._pool.allocate(missing)
                    break
                self.preempt(self._victim(request))
        return self._counts.num_preemptions - num_before

    def _victim(self, request: Request) -> Request:
        """The last in order among those not yet protected; at worst the request itself."""
        candidates = [r for r in self._queues.running.values() if not self.is_protected(r)]
        return max(candidates, key=self._queues.place, default=request)

    def preempt(self, request: Request) -> None:
        """Take a request's blocks; it computes its tokens again when readmitted.

        A step in flight may write them: it runs before whatever gets them.
        """
        self.vacate(request)
        num_lost = min(request.num_computed_tokens, request.num_tokens)
        request.num_lost_tokens = max(request.num_lost_tokens, num_lost)
        request.num_computed_tokens = request.num_written_tokens = 0
        request.has_moved = False
        begin(request)  # the choice, which comes out the same
        request.num_sent_tokens = 0
        request.drafts = request.grammar_drafts = ()
        request.num_imported_tokens = 0
        request.timings.num_preemptions += 1
        self._counts.num_preemptions += 1
        self._queues.enqueue(request)

    def is_protected(self, request: Request) -> bool:
        """Preempted often enough: admitted with all the room it can need, and never a victim."""
        return request.timings.num_preemptions >= self._config.max_preemptions

    def num_to_hold(self, request: Request) -> int:
        """Blocks for all tokens that a request has, drafts aside; if protected, will ever have."""
        if self.is_protected(request):
            return self._config.num_blocks_for(request.most_tokens - 1)
        num_tokens = request.num_tokens + request.num_pending_tokens
        return self._config.num_blocks_for(min(num_tokens, request.most_tokens - 1))

    def is_enough_for(
        self, request: Request, cached: list[int], sources: Sequence[Source] = ()
    ) -> bool:
        """Whether there are blocks for all of a request beside those that it reuses, and for the
        texts whose KV is brought to it."""
        return self._num_missing(request, cached, sources) <= 0

    def make_pins_give_way(
        self, request: Request, cached: list[int], sources: Sequence[Source]
    ) -> bool:
        """Nobody runs, and a request does not fit beside what is pinned: only one that reuses texts
        can need so much, as pins leave room for every other (retention.py). Whether it fits now."""
        if not self._queues.running:
            count = self._num_missing(request, cached, sources)
            self._pool.give_way(count, {*cached, *(b for s in sources for b in s.blocks)})
        return self.is_enough_for(request, cached, sources)

    def _num_missing(self, request: Request, cached: list[int], sources: Sequence[Source]) -> int:
        """Blocks that are needed beyond the free ones."""
        needed = self.num_to_hold(request) - len(cached)
        there = [*cached]
        for source in sources:
            needed += len(source.hashes) - len(source.blocks)
            there += source.blocks
        return needed - self._pool.num_free_beside(list(dict.fromkeys(there)))

    def fill(self, request: Request, cached: list[int], sources: Sequence[Source] = ()) -> None:
        """Give a request the blocks that it reuses, and free ones for the rest."""
        needed = self.num_to_hold(request) - len(cached)
        self._pool.retain(cached)  # first, or allocation could take what is about to be reused
        for source in sources:
            self._pool.retain(source.blocks)
        request.block_table = cached + self._pool.allocate(needed)
        request.sources = [*sources]
        for source in sources:
            source.blocks += self._pool.allocate(len(source.hashes) - len(source.blocks))

    def give_back_sources(self, request: Request) -> None:
        """The texts are where they belong, or the request runs no more."""
        for source in request.sources:
            self._pool.release(source.blocks)
        request.sources = []

    def trim(self, request: Request) -> None:
        """Take back the blocks beyond those that a request is to hold."""
        num_held = self.num_to_hold(request)
        self._pool.release(request.block_table[num_held:])
        del request.block_table[num_held:]

    def vacate(self, request: Request) -> None:
        """A request runs no more: its blocks are free when this returns."""
        self._queues.stop(request)
        self.give_back_sources(request)
        self._pool.release(request.block_table)
        request.block_table = []
        request.num_published_blocks = 0
