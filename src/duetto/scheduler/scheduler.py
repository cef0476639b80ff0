"""Decides what each step computes, and is the only writer of a request's progress.

Knows token ids and block numbers. Knows no text, no arrays, no clock (time is an argument) and no
phases: a request has tokens, some of them have KV, and a step computes some of those that do not.
"""

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from duetto.core.batch import (
    RequestResult,
    RequestUpdate,
    SampledToken,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
    TokenLogprob,
)
from duetto.core.config import SchedulerConfig
from duetto.core.draft_counts import StepDrafts
from duetto.core.errors import ConfigError
from duetto.core.request import FinishReason, Request
from duetto.core.shape import StepTime
from duetto.core.timings import Part
from duetto.scheduler.accept import accept, check_whole, stop_reason
from duetto.scheduler.block_pool import BlockHash, BlockPool
from duetto.scheduler.budget import StepBudget
from duetto.scheduler.drafts import DraftPolicy, NoDrafts
from duetto.scheduler.fairness import Turns
from duetto.scheduler.fast_forward import block_events, is_streaming, num_steps_with_room
from duetto.scheduler.latency import QueueClock, account_run, account_step
from duetto.scheduler.misses import MissMemory
from duetto.scheduler.plan import may_go_on, plan, resolved
from duetto.scheduler.policy import POLICIES, Chosen
from duetto.scheduler.prefix import publish_full_blocks, reusable_hashes, uncomputed_hashes
from duetto.scheduler.speculate import speculated, tell


@dataclass(slots=True)
class SchedulerCounts:
    """Totals since the start. Written by the Scheduler only."""

    num_preemptions: int = 0
    num_queried_tokens: int = 0  # tokens of requests at their first admission ...
    num_hit_tokens: int = 0  # ... and those of them that the prefix cache held

    def copy(self) -> "SchedulerCounts":
        return SchedulerCounts(self.num_preemptions, self.num_queried_tokens, self.num_hit_tokens)


class Scheduler:
    """One step is `schedule`, an executor's work, and `update`.

    Progress moves in `schedule`, and `update` reconciles it with what came of the step; so the next
    steps may be planned while some are in flight. Their results must come in the same order.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        step_time: StepTime | None = None,
        drafts: DraftPolicy | None = None,
    ) -> None:
        """`step_time` is the price of a step; it must be given for a target ITL, and may change
        as it learns. It decides how prompts are cut, `drafts` what is guessed, and neither what is
        answered."""
        if config.target_itl_s is not None and step_time is None:
            raise ConfigError("--target-itl: needs a model of the time that a step takes")
        self.config = config
        self._block_size = config.block_size
        self._step_time = step_time
        self._drafts = drafts or NoDrafts()
        self.pool = BlockPool(config.num_blocks)
        self.counts = SchedulerCounts()
        self.step_drafts: StepDrafts | None = None  # of the step that `update` was told of last
        self.waiting: list[Request] = []  # in the policy's order
        self.running: dict[str, Request] = {}  # admitted; holds room for all the tokens it has
        self._policy = POLICIES[config.scheduling_policy]
        self._chosen: Chosen = None  # who may be admitted; None: anyone
        self._turns = Turns(self._policy.level)
        self._queue_clock = QueueClock()
        self._misses = MissMemory(config)
        self._num_added = 0
        self._live: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # --- what callers may ask for ----------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, and changes nothing, if it can never fit."""
        self.config.check_fits(request)
        assert request.request_id not in self._live, f"{request.request_id} is live already"
        assert request.finish_reason is None, f"{request.request_id} has ended already"
        self._live[request.request_id] = request
        request.arrival_index = self._num_added
        self._num_added += 1
        self._enqueue(request)

    def end(
        self, request_id: str, reason: FinishReason, now: float, *, error: str | None = None
    ) -> RequestUpdate | None:
        """End a request between two steps, in any state: aborted by its caller, stopped by its
        text, or failed. None if it is unknown or has ended already."""
        request = self._live.get(request_id)
        return None if request is None else self._finish(request, reason, now, error=error)

    # --- one step --------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledBatch:
        """Choose what to compute. Running requests first, then as many waiting ones as fit."""
        lacks_blocks = self._make_room() > 0
        if not lacks_blocks:
            self._even_out()
        budget = StepBudget(self.config, self._step_time)
        counts = self._share(budget)
        if not lacks_blocks:  # who has just lost their blocks should not lose them to newcomers
            lacks_blocks = self._admit_waiting(counts, budget, now)
        self._queue_clock.stand(is_blocked=lacks_blocks, now=now)
        running = self.running
        plans = [(request := running[i], plan(request, n)) for i, n in counts.items()]
        plans = speculated(self._drafts, plans, budget, self.pool, self.config)
        return ScheduledBatch(tuple([_departing(request, item) for request, item in plans]))

    def update(
        self,
        batch: ScheduledBatch,
        output: StepOutput,
        now: float,
        predicted_s: float | None = None,
        step_time: StepTime | None = None,
    ) -> list[RequestUpdate]:
        """Take over what was computed. Raises EngineError, changing nothing, if it is not whole.

        `predicted_s` is what the step should have taken, to be told beside what it took;
        `step_time` prices what drafts added to it, by default as the plans were priced.
        """
        check_whole(batch, output)
        account_step(batch, self.running, now, predicted_s)
        self.step_drafts = tell(
            *(self._drafts, self._live, batch.requests, output.results),
            *(output.drafting_s, step_time or self._step_time),
        )
        updates = []
        for item, result in zip(batch.requests, output.results, strict=True):
            request = self._live.get(item.request_id)
            if request is None:
                continue  # it ended while the step was in flight
            _arrive(request, item)
            if result.error is not None:
                updates.append(self._finish(request, FinishReason.ERROR, now, error=result.error))
                continue
            update = self._take_over(request, item, result, now)
            if update is not None:
                updates.append(update)
        return updates

    def renew(self, batch: ScheduledBatch) -> ScheduledBatch:
        """A step that must be computed again, as no other is in flight before it any more: known
        tokens for its placeholders, and without those that have ended. Nor with those that have
        lost their blocks, which a later step may have written: they are computed when they are
        admitted again."""
        items = []
        for item in batch.requests:
            request = self._live.get(item.request_id)
            if request is None:
                continue
            if item.epoch == request.timings.num_preemptions:
                items.append(resolved(request, item))
            else:
                _arrive(request, item)  # and brings nothing
        return ScheduledBatch(tuple(items))

    def take_back(self, request: Request, count: int) -> None:
        """Drop the last `count` tokens of an update that is not told yet: text stopped before."""
        if count:
            del request.token_ids[-count:]
            del request.timings.token_times[-count:]

    # --- many steps at once ----------------------------------------------------------------

    def num_certain_steps(self) -> int:
        """How many of the next steps are sure to compute one token of each running request, in
        their order, and nothing else; 0 where that is not sure. Changes nothing.

        Certain as long as no request arrives or is aborted between them. In none of them does a
        request end, and none is preempted. It is assumed that the tokens to come stand in no prompt
        that waits, and end no request: true for a simulated executor, whose tokens stand for no
        text.
        """
        running = self.running.values()
        if not running or len(running) > self.config.max_num_batched_tokens or self._drafts.is_on:
            return 0
        if not all(map(is_streaming, running)) or self._is_queue_blocked() is None:
            return 0
        most = min(r.max_tokens - r.num_output_tokens for r in running) - 1
        return num_steps_with_room(running, self.pool.num_free, most, self.config)

    def advance(
        self,
        start_time: float,
        end_times: Sequence[float],
        token_of: Callable[[Request], int],
    ) -> list[int]:
        """Run `len(end_times)` steps, at most `num_certain_steps`: the fast twin of `schedule` and
        `update`. Step k ends at `end_times[k]`, and the one after begins then.

        Each gives every running request its `token_of(request)`. Returns how many blocks were free
        after each step.
        """
        is_blocked, running = bool(self._is_queue_blocked()), [*self.running.values()]
        for time in (start_time, *end_times[:-1]):
            self._queue_clock.stand(is_blocked=is_blocked, now=time)
        num_free: list[int] = []
        first = {r.request_id: r.num_tokens for r in running}  # at the first step
        placed = [(self._place(r), r) for r in running]
        for event in block_events(placed, len(end_times), self.config):
            request = event.request
            num_free += [self.pool.num_free] * (event.step - len(num_free))
            if event.is_full:
                num_computed = first[request.request_id] + event.step
                _let_have(request, num_computed, token_of(request))
                self._publish(request)
            else:
                request.block_table += self.pool.allocate(1)
        num_free += [self.pool.num_free] * (len(end_times) - len(num_free))
        for request in running:
            num_computed = first[request.request_id] + len(end_times) - 1
            _let_have(request, num_computed, token_of(request))
            account_run(request, end_times)
        return num_free

    def _is_queue_blocked(self) -> bool | None:
        """Whether it is for want of blocks that nobody is admitted; None if somebody may be.

        Holds as long as requests only grow. Places and tokens of budget stay as they are. Room for
        the first in line can only shrink: each block taken is one less that is free, and one that
        it could have reused is one more to take.
        """
        config, num_running = self.config, len(self.running)
        waiting = next(self._candidates(), None)
        if waiting is None:
            return False
        if self._turns.is_contended(self.waiting):
            return None  # one client may have to give a place to another
        if num_running >= min(config.max_num_seqs, config.max_num_batched_tokens):
            return False
        if self._hashes_being_computed():
            return None  # somebody may be passed over, and somebody else be the first
        if self._has_room(waiting, self.pool.find(reusable_hashes(waiting, config))):
            return None
        if not config.enable_chunked_prefill:
            return None  # what it needs of the budget may change too; a chunk needs one token of it
        return True

    def check(self) -> None:
        """Assert every invariant. Changes nothing."""
        self.pool.check([r.block_table for r in self.running.values()])
        assert len(self.running) <= self.config.max_num_seqs
        places = [self._place(r) for r in self.waiting]
        assert places == sorted(places), "the queue is out of order"
        assert len(self._live) == len(self.waiting) + len(self.running)
        for request in self.waiting:
            assert not request.block_table
            assert not request.num_computed_tokens and not request.num_written_tokens
        for request in self.running.values():
            assert 0 <= request.num_written_tokens <= request.num_computed_tokens
            assert request.num_written_tokens < request.num_tokens
            if not request.num_in_flight:
                assert request.num_written_tokens == request.num_computed_tokens
            held, needed = len(request.block_table), self._num_blocks_to_hold(request)
            computed = self.config.num_blocks_for(request.num_computed_tokens)
            assert computed <= held <= max(computed, needed)
        for request in (*self.waiting, *self.running.values()):
            assert request.finish_reason is None
            assert 0 <= request.num_pending_tokens <= request.num_in_flight
            assert request.num_in_flight or not request.has_drafts_in_flight
            assert len(request.block_hashes) <= request.num_tokens // self.config.block_size

    # --- room ------------------------------------------------------------------------------

    def _make_room(self) -> int:
        """Give every running request blocks for all its tokens, oldest first; preempt the newest.

        Returns how many were preempted. A running request that is left holds room for all the
        tokens it has, whether or not this step's budget reaches it.
        """
        num_before = self.counts.num_preemptions
        size = self.config.block_size
        growing = [
            r
            for r in self.running.values()
            if len(r.block_table) * size < len(r.token_ids) + r.num_pending_tokens
        ]
        for request in sorted(growing, key=self._place):
            while request.request_id in self.running:
                missing = self._num_missing_blocks(request)
                if missing <= self.pool.num_free:
                    request.block_table += self.pool.allocate(missing)
                    break
                self._preempt(self._victim(request))
        return self.counts.num_preemptions - num_before

    def _victim(self, request: Request) -> Request:
        """The last in order among those not yet protected; at worst the request itself."""
        candidates = [r for r in self.running.values() if not self._is_protected(r)]
        return max(candidates, key=self._place, default=request)

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; it computes its tokens again when readmitted.

        A step in flight may write them: it runs before whatever gets them.
        """
        self._drop(request)
        num_lost = min(request.num_computed_tokens, request.num_tokens)
        request.num_lost_tokens = max(request.num_lost_tokens, num_lost)
        request.num_computed_tokens = request.num_written_tokens = 0
        request.num_sent_tokens = 0
        request.drafts = ()
        request.num_imported_tokens = 0
        request.timings.num_preemptions += 1
        self.counts.num_preemptions += 1
        self._enqueue(request)

    def _is_protected(self, request: Request) -> bool:
        """Preempted often enough: admitted with all the room it can need, and never a victim."""
        return request.timings.num_preemptions >= self.config.max_preemptions

    def _num_blocks_to_hold(self, request: Request) -> int:
        if self._is_protected(request):
            return self.config.num_blocks_for(request.most_tokens - 1)
        num_tokens = request.num_tokens + request.num_pending_tokens
        return self.config.num_blocks_for(min(num_tokens, request.most_tokens - 1))

    def _num_missing_blocks(self, request: Request) -> int:
        return max(0, self._num_blocks_to_hold(request) - len(request.block_table))

    # --- budget and admission --------------------------------------------------------------

    def _share(self, budget: StepBudget) -> dict[str, int]:
        """Tokens for each running request; those who need least first, so that a next token never
        waits behind a chunk."""
        counts: dict[str, int] = {}
        ready = [r for r in self.running.values() if not r.num_in_flight or may_go_on(r)]
        ready.sort(key=_num_uncomputed)
        for request in ready:
            if count := budget.most(request, request.num_computed_tokens):
                counts[request.request_id] = count
                budget.spend(request, request.num_computed_tokens, count)
        return counts

    def _admit_waiting(self, counts: dict[str, int], budget: StepBudget, now: float) -> bool:
        """Admit in order until budget, places or blocks run out, and add to `counts`.

        Returns whether it is blocks that the next in order lacks.
        """
        most = self.config.max_num_seqs
        if not self.waiting or budget.is_spent or len(self.running) >= most:
            return False
        self._chosen = self._policy.choose(self._chosen, self.waiting, len(self.running), most)
        computing = self._hashes_being_computed()
        for request in self._candidates():
            if budget.is_spent or len(self.running) == most:
                return False
            if self._next_missing_hash(request) in computing:
                continue  # its prefix will soon be there to reuse
            if request.num_in_flight:
                return False  # nobody overtakes: it is next when its tokens are known
            cached = self.pool.find(reusable_hashes(request, self.config))
            num_past = self._num_past(request, cached)
            count = budget.most(request, num_past)
            if not count:
                return False  # nobody overtakes: it is next when the budget is larger
            if not self._has_room(request, cached):
                return True  # nobody overtakes: it is next when room is there
            budget.spend(request, num_past, count)
            self._admit(request, cached, now)
            counts[request.request_id] = count
            computing.update(uncomputed_hashes(request, self.config))
        return False

    def _candidates(self) -> Iterator[Request]:
        """The waiting requests that may be admitted, in their order, clients by turns."""
        chosen = self._chosen
        return self._turns.in_order(
            [r for r in self.waiting if chosen is None or r.request_id in chosen]
        )

    def _even_out(self) -> None:
        """Let a client with many places give one up, at most one a step, to one that has fewer.

        Without this, a small request would wait for all the tokens of another client's answers.
        What is preempted finds most of its KV in the prefix cache when it comes back.
        """
        if not self._turns.is_contended(self.waiting):
            return
        first = next(self._candidates(), None)
        if first is None or not self._is_in_need(first):
            return
        others = self._turns.those_in_the_way(first, self.running.values())
        victims = [r for r in others if not self._is_protected(r)]
        if victims:
            self._preempt(max(victims, key=self._place))

    def _is_in_need(self, request: Request) -> bool:
        """Whether a place or blocks are all that a waiting request waits for."""
        if self._next_missing_hash(request) in self._hashes_being_computed():
            return False
        if request.num_in_flight:
            return False  # it cannot be admitted yet
        most = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        cached = self.pool.find(reusable_hashes(request, self.config))
        return len(self.running) >= most or not self._has_room(request, cached)

    def _has_room(self, request: Request, cached: list[int]) -> bool:
        """Whether there are blocks for all of a request beside those that it reuses."""
        needed = self._num_blocks_to_hold(request) - len(cached)
        return needed <= self.pool.num_free_beside(cached)

    def _num_past(self, request: Request, cached: list[int]) -> int:
        """Tokens that need not be computed: those reused, or those whose KV came with it."""
        return max(len(cached) * self.config.block_size, request.num_imported_tokens)

    def _admit(self, request: Request, cached: list[int], now: float) -> None:
        """Reuse the published prefix, and take room for the rest."""
        needed = self._num_blocks_to_hold(request) - len(cached)
        self.pool.retain(cached)  # first, or allocation could take what is about to be reused
        request.block_table = cached + self.pool.allocate(needed)
        request.num_computed_tokens = self._num_past(request, cached)
        request.num_written_tokens = request.num_computed_tokens
        self.waiting.remove(request)
        self.running[request.request_id] = request
        self._turns.take(request)
        self._queue_clock.leave(request, now)
        if request.timings.first_scheduled_time is None:
            self._note_first_admission(request, len(cached), now)

    def _note_first_admission(self, request: Request, num_found: int, now: float) -> None:
        request.timings.first_scheduled_time = now
        request.timings.cache_miss = self._misses.explain(request, num_found, self.pool)
        request.num_cached_tokens = request.num_computed_tokens
        self.counts.num_queried_tokens += request.num_tokens
        self.counts.num_hit_tokens += request.num_computed_tokens

    def _next_missing_hash(self, request: Request) -> BlockHash | None:
        hashes = reusable_hashes(request, self.config)
        num_found = len(self.pool.find(hashes))
        return hashes[num_found] if num_found < len(hashes) else None

    def _hashes_being_computed(self) -> set[BlockHash]:
        if not self.waiting or not self.config.enable_prefix_caching:
            return set()
        return {h for r in self.running.values() for h in uncomputed_hashes(r, self.config)}

    # --- what a step gave ------------------------------------------------------------------

    def _publish(self, request: Request) -> None:
        num_before = request.num_published_blocks
        publish_full_blocks(request, self.config, self.pool)
        for index in range(num_before, request.num_published_blocks):
            self._misses.learn(request, index)

    def _reconcile(self, request: Request, item: ScheduledRequest, result: RequestResult) -> None:
        """Progress over what was written and is right; what drafts took and did not need goes."""
        request.num_written_tokens = item.num_computed_tokens + len(item.token_ids)
        request.drafts = result.drafts
        if item.num_drafts:
            num_wrong = item.num_drafts - (len(result.tokens) - 1)
            request.num_written_tokens -= num_wrong
            request.num_computed_tokens -= num_wrong
            self._give_back(request)
        num_full = min(request.num_written_tokens, len(request.token_ids)) // self._block_size
        if num_full > request.num_published_blocks:
            self._publish(request)

    def _give_back(self, request: Request) -> None:
        """Blocks beyond those that a request is to hold."""
        num_held = self._num_blocks_to_hold(request)
        self.pool.release(request.block_table[num_held:])
        del request.block_table[num_held:]

    def _take_over(
        self, request: Request, item: ScheduledRequest, result: RequestResult, now: float
    ) -> RequestUpdate | None:
        """Tokens always; KV if the blocks are those that the step wrote."""
        tokens, reason = accept(request, result.tokens)
        for sampled in tokens:
            request.token_ids.append(sampled.token_id)
            request.timings.token_times.append(now)
        if item.epoch == request.timings.num_preemptions:
            self._reconcile(request, item, result)
        scores = _untold(request, item, result.scores) if result.scores else ()
        if reason is not None:
            return self._finish(request, reason, now, tokens=tokens, prompt_logprobs=scores)
        if not tokens and not scores:
            return None
        return RequestUpdate(request.request_id, tokens, scores, "", request.num_cached_tokens)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        now: float,
        *,
        tokens: tuple[SampledToken, ...] = (),
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> RequestUpdate:
        """End a request: its blocks are free when this returns."""
        if request.request_id in self.running:
            self._drop(request)
            request.timings.account(Part.STALLED, now)  # between steps; nothing within update()
        else:
            self.waiting.remove(request)
            self._queue_clock.leave(request, now)
        del self._live[request.request_id]
        self._drafts.forget(request)
        request.finish_reason = reason
        request.timings.finish_time = now
        return RequestUpdate(
            request.request_id,
            tokens=tokens,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=request.num_cached_tokens,
            finish_reason=reason,
            stop_reason=stop_reason(request, reason),
            error=error,
            timings=request.timings,
        )

    # --- queues ----------------------------------------------------------------------------

    def _place(self, request: Request) -> tuple[float, int]:
        return self._policy.order(request, self.config), request.arrival_index

    def _enqueue(self, request: Request) -> None:
        insort(self.waiting, request, key=self._place)
        self._queue_clock.enter(request)

    def _drop(self, request: Request) -> None:
        del self.running[request.request_id]
        self._turns.give_back(request)
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_published_blocks = 0


def _num_uncomputed(request: Request) -> int:
    """`Request.num_uncomputed_tokens` in one call less: each step asks for each request."""
    return len(request.token_ids) + request.num_pending_tokens - request.num_computed_tokens


def _departing(request: Request, item: ScheduledRequest) -> ScheduledRequest:
    """The step is about to be in flight: the progress of the request moves."""
    request.num_computed_tokens += len(item.token_ids)
    request.num_in_flight += 1
    if item.rows:
        request.num_pending_tokens += 1
    drafting = item.drafting
    if drafting is not None:
        request.num_sent_tokens = drafting.start + len(drafting.token_ids)
        request.sent_to = drafting.method
        request.has_drafts_in_flight = drafting.num_wanted > 0
    if item.num_drafts:
        request.has_drafts_in_flight = True
    return item


def _arrive(request: Request, item: ScheduledRequest) -> None:
    """The step is no longer in flight, whatever came of it."""
    request.num_in_flight -= 1
    if item.rows:
        request.num_pending_tokens -= 1
    if item.num_drafts or (item.drafting is not None and item.drafting.num_wanted):
        request.has_drafts_in_flight = False  # and no later step has any: it waited


def _let_have(request: Request, num_computed: int, token_id: int) -> None:
    """Let a request have `num_computed` tokens computed, and the next one sampled."""
    request.token_ids += [token_id] * (num_computed + 1 - request.num_tokens)
    request.num_computed_tokens = request.num_written_tokens = num_computed


def _untold(
    request: Request, item: ScheduledRequest, scores: tuple[TokenLogprob, ...]
) -> tuple[TokenLogprob, ...]:
    """Scores of prompt tokens that were not told before a preemption."""
    untold = scores[max(0, request.num_scored_tokens - item.num_computed_tokens) :]
    end = item.num_computed_tokens + len(scores)
    request.num_scored_tokens = max(request.num_scored_tokens, end)
    return untold
