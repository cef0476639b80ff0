"""Who of those that wait is admitted to a step, and who gives way to them.

Nobody overtakes the first in order, but one whose prefix, or a text that it reuses, is being
computed is passed over; a number of times, since what it waits for may be evicted again and again.
"""

from collections.abc import Sequence

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.scheduler.block_pool import BlockHash, BlockPool
from duetto.scheduler.budget import StepBudget
from duetto.scheduler.counts import SchedulerCounts
from duetto.scheduler.misses import MissMemory
from duetto.scheduler.prefix import reusable_hashes, uncomputed_hashes
from duetto.scheduler.queues import Queues
from duetto.scheduler.reuse import find_sources, unwritten_hashes
from duetto.scheduler.room import Room
from duetto.scheduler.tiers import BlockLoad, Tiers

MAX_PASSED_OVER = 16  # steps; more than those in which one request computes a prefix and texts


class Admission:
    """The writer of a request's progress at its admission, which is what it need not compute."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        queues: Queues,
        room: Room,
        misses: MissMemory,
        counts: SchedulerCounts,
        tiers: Tiers,
    ) -> None:
        self._config = config
        self._pool = pool
        self._queues = queues
        self._room = room
        self._misses = misses
        self._counts = counts
        self._tiers = tiers

    def admit(self, counts: dict[str, int], budget: StepBudget, now: float) -> bool:
        """Admit in order until budget, places or blocks run out, and add to `counts`, which are the
        tokens that each request computes. Returns whether it is blocks that the next one lacks.
        """
        queues, config = self._queues, self._config
        running, most = queues.running, config.max_num_seqs
        if not queues.waiting or budget.is_spent or len(running) >= most:
            return False
        queues.choose(most)
        computing = self._hashes_being_computed()
        for request in queues.candidates():
            if budget.is_spent or len(running) == most:
                return False
            sources = find_sources(request, config, self._pool)
            if self._is_being_computed(request, sources, computing):
                if request.num_passed_over == MAX_PASSED_OVER:
                    return False  # nobody overtakes any more: it is next when it is there
                request.num_passed_over += 1
                continue  # its prefix, or a text of it, will soon be there to reuse
            if request.num_in_flight:
                return False  # nobody overtakes: it is next when its tokens are known
            cached = self._pool.find(reusable_hashes(request, config))
            num_past = self._num_past(request, cached)
            loads: list[BlockLoad] = []
            if self._tiers.is_on:
                if self._is_to_wait(request, cached, sources):
                    continue  # what it lacks will soon be there to load
                loads = self._loads(request, cached, sources)
                num_past = self._num_past(request, cached, loads)
            count = budget.most(request, num_past, sources)
            if not count:
                return False  # nobody overtakes: it is next when the budget is larger
            if not self._has_room(request, cached, sources, loads):
                return True  # nobody overtakes: it is next when room is there
            budget.spend(request, num_past, count, sources)
            self._admit(request, cached, sources, loads, now)
            counts[request.request_id] = count
            computing.update(uncomputed_hashes(request, config))
            computing.update(unwritten_hashes(request, config))
        return False

    def even_out(self) -> None:
        """Let a client with many places give one up, at most one a step, to one that has fewer.

        Without this, a small request would wait for all the tokens of another client's answers.
        What is preempted finds most of its KV in the prefix cache when it comes back.
        """
        if not self._queues.is_contended():
            return
        first = next(self._queues.candidates(), None)
        if first is None or not self._is_in_need(first):
            return
        others = self._queues.in_the_way_of(first)
        victims = [r for r in others if not self._room.is_protected(r)]
        if victims:
            self._room.preempt(max(victims, key=self._queues.place))

    def is_blocked(self) -> bool | None:
        """Whether it is for want of blocks that nobody is admitted; None if somebody may be.

        Holds as long as requests only grow. Places and tokens of budget stay as they are. Room for
        the first in line can only shrink: each block taken is one less that is free, and one that
        it could have reused is one more to take.
        """
        config, num_running = self._config, len(self._queues.running)
        first = next(self._queues.candidates(), None)
        if first is None:
            return False
        if self._queues.is_contended():
            return None  # one client may have to give a place to another
        if num_running >= min(config.max_num_seqs, config.max_num_batched_tokens):
            return False
        if self._hashes_being_computed():
            return None  # somebody may be passed over, and somebody else be the first
        sources = find_sources(first, config, self._pool)
        if self._room.is_enough_for(
            first, self._pool.find(reusable_hashes(first, config)), sources
        ):
            return None
        if not config.enable_chunked_prefill:
            return None  # what it needs of the budget may change too; a chunk needs one token of it
        return True

    def _is_in_need(self, request: Request) -> bool:
        """Whether a place or blocks are all that a waiting request waits for."""
        sources = find_sources(request, self._config, self._pool)
        if self._is_being_computed(request, sources, self._hashes_being_computed()):
            return False
        if request.num_in_flight:
            return False  # it cannot be admitted yet
        most = min(self._config.max_num_seqs, self._config.max_num_batched_tokens)
        cached = self._pool.find(reusable_hashes(request, self._config))
        has_room = self._room.is_enough_for(request, cached, sources)
        return len(self._queues.running) >= most or not has_room

    def _has_room(
        self, request: Request, cached: list[int], sources: list[Source], loads: list[BlockLoad]
    ) -> bool:
        """Also by pins that give way. What they held goes to RAM, where what is to be loaded must
        not fall out for it."""
        if self._room.is_enough_for(request, cached, sources):
            return True
        with self._tiers.keeping([key for load in loads for key in load.keys]):
            return self._room.make_pins_give_way(request, cached, sources)

    def _num_past(
        self, request: Request, cached: list[int], loads: Sequence[BlockLoad] = ()
    ) -> int:
        """Tokens that need not be computed: those reused, or those whose KV came with it."""
        num_blocks = len(cached) + _num_own(loads)
        return max(num_blocks * self._config.block_size, request.num_imported_tokens)

    def _is_to_wait(self, request: Request, cached: list[int], sources: list[Source]) -> bool:
        """Whether blocks that it lacks are on their way to RAM, or are sent for now."""
        lacking = [(s.hashes[len(s.blocks) :], s.num_computed) for s in sources]
        own = reusable_hashes(request, self._config)[len(cached) :]
        lacking.append((own, len(cached) * self._config.block_size))
        if any(self._tiers.is_on_its_way(keys) for keys, _ in lacking):
            return True
        return self._tiers.send_for(request, lacking)

    def _loads(self, request: Request, cached: list[int], sources: list[Source]) -> list[BlockLoad]:
        """What comes from RAM of a request's texts, which count it as computed, and of itself."""
        size, loads = self._config.block_size, list[BlockLoad]()
        for source in sources:
            first = len(source.blocks)
            keys = source.hashes[first:]
            count = self._tiers.num_loadable(keys, source.num_computed, source.num_left)
            if count:
                loads.append(BlockLoad(keys[:count], first, source))
                source.num_computed = min((first + count) * size, len(source.token_ids))
        keys, first = reusable_hashes(request, self._config)[len(cached) :], len(cached)
        count = self._tiers.num_loadable(keys, first * size, len(keys) * size)
        if count and not request.num_imported_tokens:
            loads.append(BlockLoad(keys[:count], first))
        return loads

    def _admit(
        self,
        request: Request,
        cached: list[int],
        sources: list[Source],
        loads: list[BlockLoad],
        now: float,
    ) -> None:
        """Reuse the published prefix, load what RAM has, and take room for the rest.

        What is loaded is computed by this step, as far as others see."""
        for load in loads:
            self._tiers.hold(request, load.keys)  # or it could fall out for what is evicted
        if self._tiers.is_on:
            num_there = len(cached) + _num_own(loads)
            self._tiers.note_computed(reusable_hashes(request, self._config)[num_there:])
        self._room.fill(request, cached, sources)
        for load in loads:
            table = request.block_table if load.source is None else load.source.blocks
            blocks = table[load.first : load.first + len(load.keys)]
            self._tiers.load(load.keys, blocks, request.tenant)
        self._tiers.release(request.request_id)
        request.num_computed_tokens = self._num_past(request, cached, loads)
        request.num_written_tokens = self._num_past(request, cached)
        request.num_loaded_tokens = request.num_computed_tokens if loads else 0
        self._queues.run(request, now)
        if request.timings.first_scheduled_time is None:
            self._note_first_admission(request, len(cached) + _num_own(loads), now)
            request.num_missing_tokens = sum([source.num_left for source in sources])

    def _note_first_admission(self, request: Request, num_found: int, now: float) -> None:
        request.timings.first_scheduled_time = now
        request.timings.cache_miss = self._misses.explain(request, num_found, self._pool)
        request.timings.segment_hits = self._misses.explain_segments(request, self._pool)
        request.num_cached_tokens = request.num_computed_tokens
        self._counts.num_queried_tokens += request.num_tokens
        self._counts.num_hit_tokens += request.num_computed_tokens

    def _is_being_computed(
        self, request: Request, sources: list[Source], computing: set[BlockHash]
    ) -> bool:
        if self._next_missing_hash(request) in computing:
            return True
        return any(h in computing for s in sources for h in s.hashes[len(s.blocks) :][:1])

    def _next_missing_hash(self, request: Request) -> BlockHash | None:
        hashes = reusable_hashes(request, self._config)
        num_found = len(self._pool.find(hashes))
        return hashes[num_found] if num_found < len(hashes) else None

    def _hashes_being_computed(self) -> set[BlockHash]:
        if not self._queues.waiting or not self._config.enable_prefix_caching:
            return set()
        running = self._queues.running.values()
        hashes = {h for r in running for h in uncomputed_hashes(r, self._config)}
        return hashes.union(*[unwritten_hashes(r, self._config) for r in running if r.sources])


def _num_own(loads: Sequence[BlockLoad]) -> int:
    """Blocks that are loaded for a request itself, not for its texts."""
    return sum([len(load.keys) for load in loads if load.source is None])
