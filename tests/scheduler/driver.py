"""Drives a Scheduler and a ShadowExecutor by rules, and judges every plan, update and state.

The rules are what an engine and its callers can do: add, step (also one that fails), abort, stop,
forget the cache; and a preemption out of the blue. The state machine of Hypothesis and the random
walk both drive it; the faults planted by test_planted_faults.py are planted in its scheduler.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal, get_args

import pytest
from fakes import ShadowExecutor
from msgspec.msgpack import decode, encode
from scheduler.guesses import Guesses
from scheduler.judge import Account, CacheJudge, check_state, fits
from scheduler.plan_judge import PlanCase, judge_plan, lacks_blocks, price

from duetto.core.batch import RequestUpdate, ScheduledBatch, ScheduledRequest, StepOutput
from duetto.core.config import SchedulerConfig
from duetto.core.errors import EngineError, InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.engine.engine import Engine
from duetto.scheduler.scheduler import Scheduler

MakeScheduler = Callable[..., Scheduler]  # of a SchedulerConfig, and perhaps of a price
# Of a step: it raises once, before or after it wrote; a row fails, or lacks; one request makes it
# raise, or every one, however often it is tried.
Fault = Literal["before", "after", "row", "short", "poison", "broken"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


class Watched:
    """A scheduler whose plans are judged as an engine asks for them."""

    def __init__(self, scheduler: Scheduler, driver: "Driver") -> None:
        self._scheduler = scheduler
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def schedule(self, now: float) -> ScheduledBatch:
        running, config = self._scheduler.running, self._scheduler.config
        was_running = list(running)
        was_short = any(lacks_blocks(request, config) for request in running.values())
        batch = self._scheduler.schedule(now)
        self._driver.see(batch, was_running, was_short)
        return batch

    def update(
        self, batch: ScheduledBatch, output: StepOutput, now: float, *prices: Any
    ) -> list[RequestUpdate]:
        if self._driver.encodes:
            assert decode(encode(output), type=StepOutput) == output
        return self._scheduler.update(batch, output, now, *prices)


class Driver:
    """A scheduler in a world without a model. Every rule raises if what it sees is wrong."""

    def __init__(
        self,
        config: SchedulerConfig,
        make_scheduler: MakeScheduler = Scheduler,
        *,
        depth: int = 0,
        drafts: Guesses | None = None,
    ) -> None:
        """`depth`: steps in flight; `drafts`: who is asked how many to try."""
        self.config = config
        step_time = None if config.target_itl_s is None else price
        self.scheduler = make_scheduler(config, step_time, drafts)
        self.executor = ShadowExecutor(config.num_blocks, config.block_size)
        self.depth = depth
        self._drafts = drafts
        watched: Any = Watched(self.scheduler, self)
        self.engine = Engine(watched, self.executor, clock=lambda: self._now, depth=depth)
        self.live: dict[str, Account] = {}  # accepted, no final update so far
        self.ended: list[str] = []
        self.num_steps = 0
        self.encodes = False
        self.num_encoded = 0
        self._fault: tuple[Fault | None, str] = (None, "")
        self._cache_judge = CacheJudge()
        self.num_added = 0
        self._now = 0.0  # whole numbers, so that sums of durations are exact
        self._chosen: set[str] = set()  # the batch of static batching

    # --- rules -----------------------------------------------------------------------------

    def add(self, request: Request, dead_end: int | None = None) -> bool:
        """Add a request; whether it is accepted is known beforehand. At `dead_end` tokens its own
        masks leave nothing to sample."""
        request.arrival_time = request.timings.arrival_time = self._now
        request.timings.accounted_until = self._now
        self.num_added += 1
        if not fits(request, self.config):
            before = list(self.scheduler.waiting)
            with pytest.raises(InvalidRequest):
                self.scheduler.add(request)
            assert self.scheduler.waiting == before, "a refusal changes something"
            return False
        self.scheduler.add(request)
        ageing = request.arrival_time / self.config.ageing_s
        by_priority = self.config.scheduling_policy == "priority"
        key = request.priority + ageing if by_priority else 0.0
        self.live[request.request_id] = Account(request, (key, self.num_added), dead_end)
        if dead_end is not None:
            self.executor.dead_ends[request.request_id] = dead_end
        return True

    def step(self, fault: Fault | None = None, victim: str = "") -> None:
        """One step of an engine. `victim` is the request whose row fails, or whose token lacks."""
        scheduler, executor = self.scheduler, self.executor
        if not scheduler.running:
            self._chosen = {r.request_id for r in scheduler.waiting[: self.config.max_num_seqs]}
        self._pass_time(1)
        self._fault = (fault, victim)
        executor.fail_next = fault == "before"
        executor.fail_after_writing = fault == "after"
        executor.fail_requests = {victim} if fault == "row" else set()
        executor.short = {victim} if fault == "short" else set()
        executor.poisoned = {victim} if fault == "poison" else set()
        executor.is_broken = fault == "broken"
        if not self.engine._in_flight:
            executor.is_tainted = False
        executor.raises_late = self._now % 2 == 0
        if not self.depth:
            executor.blamed.clear()
        had_work = bool(self.live)
        report = self.engine.step()
        if executor.complaint is not None:
            raise executor.complaint
        assert had_work or not report.updates
        self.num_steps += had_work
        updates = report.updates
        assert len({update.request_id for update in updates}) == len(updates)
        if self.depth:
            assert _errors(updates) <= executor.blamed, "wrong requests end in an error"
        else:
            assert _errors(updates) == executor.blamed, "wrong requests end in an error"
        for update in updates:
            self._hear(update)

    def abort(self, request_id: str) -> None:
        self._pass_time(1)
        was_live = request_id in self.live
        update = self.scheduler.end(request_id, FinishReason.ABORT, self._now)
        assert (update is not None) == was_live
        if update is not None:
            assert update.finish_reason is FinishReason.ABORT
            self._hear(update)

    def stop(self, request_id: str) -> None:
        """What the engine does when text has reached a stop string."""
        if request_id in self.scheduler.running:
            self.scheduler.end(request_id, FinishReason.STOP, self._now)
            self._end(request_id, FinishReason.STOP)

    def preempt(self, request_id: str) -> None:
        """Take the blocks of a request that could be a victim now."""
        request = self.scheduler.running.get(request_id)
        account = self.live.get(request_id)
        if request and account and account.num_preemptions < self.config.max_preemptions:
            account.num_preemptions += 1
            self.scheduler._room.preempt(request)

    def forget_all(self) -> None:
        self.scheduler.pool.forget_all()

    def drain(self) -> None:
        """Without faults and arrivals everything ends, in a number of steps known beforehand.

        A step computes at least one token, and a request computes each of its tokens at most once
        for each time that it is admitted; but where it reuses texts, also those, and once a round.
        """
        admissions = self.config.max_preemptions + 1
        bound = sum(_num_passes(a.request) * a.request.most_tokens for a in self.live.values())
        bound *= admissions
        bound = (bound + 2) * (self.depth + 1)  # some steps only wait for results
        first = self.num_steps
        while self.live:
            self.step()
            assert self.num_steps - first <= bound, "work is left, and no end of it in sight"
        while self.engine.has_work:
            self.step()
        if self._drafts is not None:
            assert self._drafts.num_ended == len(self.ended), "the policy is not told of an end"
        assert not self.scheduler.has_work
        self.check()
        self.check_cache()
        assert self.scheduler.pool.num_free == self.config.num_blocks, "leaked blocks"

    # --- judging ---------------------------------------------------------------------------

    def check(self) -> None:
        check_state(self.scheduler, self.live)

    def check_cache(self) -> None:
        for account in self.live.values():
            self._cache_judge.learn(account, self.config.block_size)
        self._cache_judge.check(self.scheduler, self.executor)

    def see(self, batch: ScheduledBatch, was_running: list[str], was_short: bool) -> None:
        """Judge a plan, as soon as it is made."""
        if self.encodes:
            assert decode(encode(batch), type=ScheduledBatch) == batch
            self.num_encoded += 1
        case = PlanCase(
            batch,
            self.scheduler,
            self.live,
            was_running,
            was_short,
            self._in_flight(),
            self._chosen,
            self.depth,
        )
        judge_plan(case)
        if not self.depth:
            self._judge_refusal(batch)
        self._pass_time(2)

    def _in_flight(self) -> dict[str, list[ScheduledRequest]]:
        """What steps in flight compute, of those that live, without the one just planned."""
        assert len(self.engine._in_flight) <= self.depth, "too many steps are in flight"
        items: dict[str, list[ScheduledRequest]] = {}
        for item in chain.from_iterable(step.batch.requests for step in self.engine._in_flight):
            if item.request_id in self.live:
                items.setdefault(item.request_id, []).append(item)
        return items

    def _judge_refusal(self, batch: ScheduledBatch) -> None:
        """An output that is not whole is refused, and changes nothing."""
        fault, victim = self._fault
        if fault != "short" or victim not in _givers(batch):
            return
        self.executor.has_raised = True  # it is computed again
        output = self.executor.execute(batch)
        given = zip(batch.requests, output.results, strict=True)
        if any(item.request_id == victim and result.error for item, result in given):
            return  # its answer ends here: an error is whole
        before = [_state(request) for request in self.scheduler.running.values()]
        with pytest.raises(EngineError):
            self.scheduler.update(batch, output, self._now)
        assert before == [_state(request) for request in self.scheduler.running.values()]

    def _hear(self, update: RequestUpdate) -> None:
        assert update.request_id in self.live, "an update after the final one"
        account = self.live[update.request_id]
        account.hear(update)
        if account.final is not None:
            self._bury(account)

    def _end(self, request_id: str, reason: FinishReason) -> None:
        account = self.live[request_id]
        account.end(reason)
        self._bury(account)

    def _bury(self, account: Account) -> None:
        request_id = account.request.request_id
        del self.live[request_id]
        self.ended.append(request_id)
        self._cache_judge.learn(account, self.config.block_size)

    def _pass_time(self, seconds: int) -> None:
        self._now += seconds


def _errors(updates: Sequence[RequestUpdate]) -> set[str]:
    return {u.request_id for u in updates if u.finish_reason is FinishReason.ERROR}


def _givers(batch: ScheduledBatch) -> set[str]:
    """Those of whom a step must return something: a token or scores."""
    return {
        item.request_id
        for item in batch.requests
        if item.rows or item.prompt_logprob_targets or item.look
    }


def _num_passes(request: Request) -> int:
    """How often a token may be computed, at most."""
    return 3 + request.reuse.num_rounds if request.candidates and request.reuse else 1


def _state(request: Request) -> tuple[object, ...]:
    timings = request.timings
    return (
        request.num_computed_tokens,
        request.num_in_flight,
        tuple(request.token_ids),
        tuple(request.block_table),
        request.num_published_blocks,
        timings.accounted_until,
        len(timings.token_times),
        request.reused,
        request.choosing and tuple(request.choosing.scores.items()),
        tuple(timings.parts.values()),
    )
