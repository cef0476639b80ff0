"""Decides what each step computes, and is the only writer of a request's progress.

Knows token ids and block numbers. Knows no text, no arrays, no clock (time is an argument) and no
phases: a request has tokens, some of them have KV, and a step computes some of those that do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

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
from duetto.core.draft_counts import GRAMMAR, StepDrafts
from duetto.core.errors import ConfigError
from duetto.core.request import FinishReason, Request
from duetto.core.shape import StepTime
from duetto.core.timings import Part
from duetto.scheduler.accept import accept, check_whole, stop_reason
from duetto.scheduler.admission import Admission
from duetto.scheduler.block_pool import BlockPool
from duetto.scheduler.budget import StepBudget
from duetto.scheduler.choice import begin, take_look
from duetto.scheduler.counts import SchedulerCounts
from duetto.scheduler.drafts import DraftPolicy, NoDrafts
from duetto.scheduler.fast_forward import (
    block_events,
    is_streaming,
    let_have,
    num_steps_in_block,
    num_steps_with_room,
)
from duetto.scheduler.imports import Imports
from duetto.scheduler.in_flight import arrive, departing
from duetto.scheduler.latency import account_run, account_step
from duetto.scheduler.misses import MissMemory
from duetto.scheduler.plan import may_go_on, plan, resolved
from duetto.scheduler.publishing import Publisher
from duetto.scheduler.queues import Queues
from duetto.scheduler.retention import Retention
from duetto.scheduler.reuse import brings_the_last, counted_reuse, num_wanted
from duetto.scheduler.room import Room
from duetto.scheduler.speculate import Policies, speculated, tell
from duetto.scheduler.tiers import NO_TIERS, Tiers


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
        tiers: Tiers | None = None,
        grammar_drafts: DraftPolicy | None = None,
    ) -> None:
        """`step_time` is the price of a step; it must be given for a target ITL, and may change
        as it learns. It decides how prompts are cut, `drafts` what is guessed, `grammar_drafts`
        how much of what a grammar makes follow is tried, and none of them what is answered."""
        if config.target_itl_s is not None and step_time is None:
            raise ConfigError("--target-itl: needs a model of the time that a step takes")
        self.config = config
        self._block_size = config.block_size
        self._step_time = step_time
        self._drafts = Policies(grammar_drafts or NoDrafts(), drafts or NoDrafts())
        self.tiers = tiers or Tiers(NO_TIERS, config.block_size)
        self.pool = BlockPool(config.num_blocks, self.tiers.keep if self.tiers.is_on else None)
        self.retention = Retention(config, self.pool, self.tiers)
        self.counts = SchedulerCounts()
        self.step_drafts: StepDrafts | None = None  # of the step that `update` was told of last
        self._queues = queues = Queues(config)
        self.waiting = queues.waiting  # in the policy's order
        self.running = queues.running
        self._room = Room(config, self.pool, queues, self.counts)
        self._misses = MissMemory(config)
        self._publisher = Publisher(config, self.pool, self._misses, self.tiers)
        self.imports = Imports(config, self.pool, queues, self._publisher)
        self._admission = Admission(
            config, self.pool, queues, self._room, self._misses, self.counts, self.tiers
        )
        self._num_added = 0
        self._live: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.tiers.has_pending)

    # --- what callers may ask for ----------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, and changes nothing, if it can never fit."""
        self.config.check_fits(request)
        assert request.request_id not in self._live, f"{request.request_id} is live already"
        assert request.finish_reason is None, f"{request.request_id} has ended already"
        self._live[request.request_id] = request
        request.arrival_index = self._num_added
        self._num_added += 1
        begin(request)
        self._queues.enqueue(request)

    def end(
        self, request_id: str, reason: FinishReason, now: float, *, error: str | None = None
    ) -> RequestUpdate | None:
        """End a request between two steps, in any state: aborted by its caller, stopped by its
        text, or failed. None if it is unknown or has ended already."""
        request = self._live.get(request_id)
        return None if request is None else self._finish(request, reason, now, error=error)

    def forget_cached(self) -> None:
        """Make no KV findable, in the arena or another tier."""
        self.pool.forget_all()
        self.tiers.forget_all()

    # --- one step --------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledBatch:
        """Choose what to compute. Running requests first, then as many waiting ones as fit."""
        self.tiers.begin(now)
        self.retention.expire(now)
        lacks_blocks = self._room.make() > 0
        if not lacks_blocks:
            self._admission.even_out()
        budget = StepBudget(self.config, self._step_time)
        counts = self._share(budget)
        if not lacks_blocks:  # who has just lost their blocks should not lose them to newcomers
            lacks_blocks = self._admission.admit(counts, budget, now)
            self.imports.settle(self.running)
            if lacks_blocks and not self.running:
                self.imports.give_way()
        self._queues.clock.stand(is_blocked=lacks_blocks, now=now)
        running = self.running
        plans = [(request := running[i], plan(request, n)) for i, n in counts.items()]
        plans = speculated(self._drafts, plans, budget, self.pool, self.config)
        requests = tuple([departing(request, item) for request, item in plans])
        if not self.tiers.is_on:
            return ScheduledBatch(requests)
        awaits = self.tiers.awaited() if self.waiting and not requests else ()
        return ScheduledBatch(requests, self.tiers.departing(), awaits, self.tiers.num_taken)

    def update(
        self,
        batch: ScheduledBatch,
        output: StepOutput,
        now: float,
        predicted_s: float | None = None,
        step_time: StepTime | None = None,
    ) -> list[RequestUpdate]:
        """Take over what was computed. Raises RefusedOutput, changing nothing, if it is not whole.

        `predicted_s` is what the step should have taken, to be told beside what it took;
        `step_time` prices what drafts added to it, by default as the plans were priced.
        """
        check_whole(batch, output)
        self.tiers.take(output.moved)
        if not batch.requests:
            return []
        account_step(batch, self.running, now, predicted_s)
        self.step_drafts = tell(
            self._drafts, self._live, batch, output, step_time or self._step_time
        )
        updates = []
        for item, result in zip(batch.requests, output.results, strict=True):
            request = self._live.get(item.request_id)
            if request is None:
                continue  # it ended while the step was in flight
            arrive(request, item)
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
                arrive(request, item)  # and brings nothing
        return replace(batch, requests=tuple(items), awaits=())

    def take_back(self, request: Request, count: int) -> None:
        """Drop the last `count` tokens of an update that is not told yet: text stopped before."""
        if not count:
            return
        del request.token_ids[-count:]
        del request.timings.token_times[-count:]
        told = request.timings.speculation
        if told is not None and self.step_drafts is not None:  # several tokens: drafts among them
            self.step_drafts = self.step_drafts.taken_back(
                told.last_chain, count, of_grammar=told.last_method == GRAMMAR
            )
            told.take_back(count)

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
        if not running or len(running) > self.config.max_num_batched_tokens:
            return 0
        if self._drafts.of_proposers.is_on:
            return 0
        if self.tiers.is_on and (self.waiting or self.tiers.has_pending):
            return 0
        if not all(map(is_streaming, running)) or self._admission.is_blocked() is None:
            return 0
        most = min(r.max_tokens - r.num_output_tokens for r in running) - 1
        if self.tiers.is_on:  # a block that is taken, or becomes full, may be moved
            most = min(most, *[num_steps_in_block(r, self.config) for r in running])
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
        is_blocked, running = bool(self._admission.is_blocked()), [*self.running.values()]
        for time in (start_time, *end_times[:-1]):
            self._queues.clock.stand(is_blocked=is_blocked, now=time)
        num_free: list[int] = []
        first = {r.request_id: r.num_tokens for r in running}  # at the first step
        placed = [(self._queues.place(r), r) for r in running]
        for event in block_events(placed, len(end_times), self.config):
            request = event.request
            num_free += [self.pool.num_free] * (event.step - len(num_free))
            if event.is_full:
                num_computed = first[request.request_id] + event.step
                let_have(request, num_computed, token_of(request))
                self._publisher.publish(request)
            else:
                request.block_table += self.pool.allocate(1)
        num_free += [self.pool.num_free] * (len(end_times) - len(num_free))
        for request in running:
            num_computed = first[request.request_id] + len(end_times) - 1
            let_have(request, num_computed, token_of(request))
            account_run(request, end_times)
        return num_free

    def check(self) -> None:
        """Assert every invariant. Changes nothing."""
        running = self.running.values()
        sources = [source for request in running for source in request.sources]
        tables = [r.block_table for r in running] + [s.blocks for s in sources]
        self.pool.check([*tables, *self.imports.tables])
        self.imports.check()
        self.tiers.check()
        self.retention.check()
        assert all(0 <= s.num_written <= s.num_computed <= len(s.token_ids) for s in sources)
        assert len(self.running) <= self.config.max_num_seqs
        places = [self._queues.place(r) for r in self.waiting]
        assert places == sorted(places), "the queue is out of order"
        assert len(self._live) == len(self.waiting) + len(self.running)
        for request in self.waiting:
            assert not request.block_table and not request.sources and not request.has_moved
            assert not request.num_computed_tokens and not request.num_written_tokens
            assert request.reused == request.candidates, "it has chosen already"
        for request in self.running.values():
            assert 0 <= request.num_written_tokens <= request.num_computed_tokens
            assert request.num_written_tokens < request.num_tokens
            if not request.num_in_flight:
                assert request.num_written_tokens == request.num_computed_tokens
            held, needed = len(request.block_table), self._room.num_to_hold(request)
            computed = self.config.num_blocks_for(request.num_computed_tokens)
            assert computed <= held <= max(computed, needed)
        for request in (*self.waiting, *self.running.values()):
            assert request.finish_reason is None
            assert 0 <= request.num_pending_tokens <= request.num_in_flight
            assert request.num_in_flight or not request.has_drafts_in_flight
            assert len(request.block_hashes) <= request.num_tokens // self.config.block_size

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

    # --- what a step gave ------------------------------------------------------------------

    def _reconcile(self, request: Request, item: ScheduledRequest, result: RequestResult) -> None:
        """Progress over what was written and is right; what drafts took and did not need goes."""
        request.num_written_tokens = item.end
        request.drafts = result.drafts
        request.grammar_drafts = result.grammar_drafts
        if item.num_drafts:
            num_wrong = item.num_drafts - (len(result.tokens) - 1)
            request.num_written_tokens -= num_wrong
            request.num_computed_tokens -= num_wrong
            self._room.trim(request)
        if item.moves and brings_the_last(request, item):
            for source in request.sources:  # what was loaded of them, and nothing had to be added
                self._publisher.publish_text(request, source, source.num_computed)
            self._room.give_back_sources(request)
        if item.look is not None:
            take_look(request, item, result.looked)
        num_full = min(request.num_written_tokens, request.num_exact_tokens) // self._block_size
        if num_full > request.num_published_blocks and self.config.enable_prefix_caching:
            self._publisher.publish(request)

    def _take_over(
        self, request: Request, item: ScheduledRequest, result: RequestResult, now: float
    ) -> RequestUpdate | None:
        """Tokens always; KV if the blocks are those that the step wrote."""
        tokens, reason = accept(request, result.tokens)
        if result.embedding:
            reason = FinishReason.STOP
        for sampled in tokens:
            request.token_ids.append(sampled.token_id)
            request.timings.token_times.append(now)
        if item.epoch == request.timings.num_preemptions:
            if request.num_written_tokens < request.num_loaded_tokens:
                request.num_written_tokens = request.num_loaded_tokens
            if item.source is None:
                self._reconcile(request, item, result)
            else:
                self._publisher.publish_text(request, request.sources[item.source], item.end)
        scores = _untold(request, item, result.scores) if result.scores else ()
        if reason is not None:
            final = self._finish(request, reason, now, tokens=tokens, prompt_logprobs=scores)
            return final._replace(embedding=result.embedding) if result.embedding else final
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
            self._room.vacate(request)
            request.timings.account(Part.STALLED, now)  # between steps; nothing within update()
        else:
            self._queues.leave(request, now)
        del self._live[request.request_id]
        for policy in self._drafts:
            policy.forget(request)
        self.tiers.release(request.request_id)
        self.imports.forget(request.request_id)
        request.finish_reason = reason
        request.timings.finish_time = now
        request.timings.reuse = counted_reuse(request)
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


def _num_uncomputed(request: Request) -> int:
    return num_wanted(request, request.num_computed_tokens)


def _untold(
    request: Request, item: ScheduledRequest, scores: tuple[TokenLogprob, ...]
) -> tuple[TokenLogprob, ...]:
    """Scores of prompt tokens that were not told before a preemption."""
    untold = scores[max(0, request.num_scored_tokens - item.num_computed_tokens) :]
    end = item.num_computed_tokens + len(scores)
    request.num_scored_tokens = max(request.num_scored_tokens, end)
    return untold
