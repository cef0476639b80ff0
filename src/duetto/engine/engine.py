"""The loop: schedule, execute, update, and the text of what came out. Standard library only.

Knows no arrays and no HTTP. One Engine belongs to one thread; engine/thread.py gives it one.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

from duetto.core.batch import RequestResult, RequestUpdate, StepOutput, StepRecord
from duetto.core.cache_control import CacheMessage, CacheReply
from duetto.core.errors import STOPS_THE_PROCESS, InvalidRequest, RefusedOutput
from duetto.core.executor import Executor
from duetto.core.request import FinishReason, Request
from duetto.core.shape import StepTime
from duetto.engine.compute import Computer, Computing, Step, StepTimes
from duetto.engine.detokenizer import Detokenizer
from duetto.scheduler.counts import SchedulerCounts
from duetto.scheduler.scheduler import Scheduler
from duetto.scheduler.thinking import Thinking

logger = logging.getLogger(__name__)

STEP_FAILED = "the engine failed while computing this request; the log says why"
NOTHING_COUNTED = SchedulerCounts()
TEXT_FAILED = "the tokenizer cannot decode the answer; the log says why"


class StepReport(NamedTuple):
    """What one step changed for callers, and the step as numbers (None if nothing was computed)."""

    updates: tuple[RequestUpdate, ...]
    record: StepRecord | None = None


@dataclass(frozen=True, slots=True)
class _Text:
    request: Request
    detokenizer: Detokenizer
    shows_stop_token: bool


class Engine:
    """Runs requests to their end. Every accepted request gets exactly one final update."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        decode: Callable[[Sequence[int], bool], str] | None = None,
        clock: Callable[[], float] = monotonic,
        step_times: StepTimes | None = None,
        depth: int = 0,
        thinking: Thinking | None = None,
    ) -> None:
        """`decode(token_ids, skip_special_tokens)` gives text; without it every text is empty.

        With `step_times`, the predicted time of each step stands beside the measured one. `depth`
        is how many steps may be in flight while the next one is planned and submitted: 0 for an
        executor whose results are there at once. What `thinking` counts is no part of a step's
        time: a plain step would not have it.
        """
        self.scheduler = scheduler
        self._computer = Computer(executor, step_times)
        self._decode = decode
        self._clock = clock
        self._step_times = step_times
        self._price = None if step_times is None else step_times.step_time
        self._thinking, self._thought_s = thinking, 0.0
        self._depth = depth
        self._in_flight: deque[Step] = deque()  # oldest first
        self._last_end = 0.0  # of a step
        self._counts = scheduler.counts.copy()  # up to the step that was planned last
        self._texts: dict[str, _Text] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def wrap_executor(self, wrap: Callable[[Executor], Executor]) -> None:
        """Let somebody see each batch on its way. Before the first step."""
        self._computer.wrap(wrap)

    @property
    def step_time(self) -> StepTime | None:
        """What a step should take, as it was learned; on the engine's thread."""
        return self._price

    @property
    def computing(self) -> Computing | None:
        """What the executor computes now. Any thread may ask."""
        return self._computer.current

    def add(self, request: Request) -> None:
        """Accept a request. Raises InvalidRequest, and changes nothing, if it can never fit."""
        text = self._text_of(request)
        self.scheduler.add(request)
        if text is not None:
            self._texts[request.request_id] = text

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now, in any state; None if it is unknown or has ended."""
        update = self.scheduler.end(request_id, FinishReason.ABORT, self._clock())
        return None if update is None else self._with_text(update)

    def control(self, message: CacheMessage) -> CacheReply:
        """What a user asks of the KV cache. Raises InvalidRequest, and then changes nothing."""
        try:
            return self.scheduler.retention.answer(message, self._clock())
        finally:  # what time has ended is gone, though the message is refused
            self._hand_on_events()

    def forget_cached(self) -> None:
        """Forget every reusable prefix."""
        self.scheduler.forget_cached()

    def step(self) -> StepReport:
        """Plan and submit a step, and take the oldest result, unless more steps may be in flight.

        What makes an executor raise ends alone, with an error.
        """
        report = self._step()
        self._hand_on_events()
        return report

    def _hand_on_events(self) -> None:
        """Before anybody hears of the step."""
        events = self.scheduler.pool.events
        if events is not None:
            events.hand_on()

    def _step(self) -> StepReport:
        if not self._in_flight or not any(step.pending is None for step in self._in_flight):
            has_more = self._submit_next()
            if not self._in_flight or (len(self._in_flight) <= self._depth and has_more):
                return StepReport(())
        step = self._in_flight[0]
        output = self._result(step)
        try:
            updates = self._update(step, output)
        except RefusedOutput:  # nothing has changed: as if the executor had raised
            logger.exception("a step of %d requests failed", len(step.batch.requests))
            output = self._again(step)
            updates = self._update(step, output)
        self._in_flight.popleft()
        if not step.batch.requests:
            return StepReport(())
        texts = tuple([self._with_text(update) for update in updates])
        record = self._record(step)
        if self._step_times is not None and not step.has_failed:
            took_s = record.end_time - record.start_time - output.drafting_s - output.moving_s
            self._step_times.observe(step.batch.shape, took_s - self._thought())
        return StepReport(texts, record)

    def _submit_next(self) -> bool:
        """Whether there was something to compute."""
        start = self._clock()
        batch = self.scheduler.schedule(start)
        if batch.is_empty:
            return False
        step = Step(batch, start, self._counted())
        self._in_flight.append(step)  # first: if the process is told to end, it is still to be done
        self._computer.submit(step)
        return True

    def _thought(self) -> float:
        """What deciding about drafts has taken since this was asked last."""
        if self._thinking is None:
            return 0.0
        before, self._thought_s = self._thought_s, self._thinking.total_s
        return self._thought_s - before

    def _counted(self) -> SchedulerCounts:
        """What the scheduler has counted since this was asked last."""
        counts, before = self.scheduler.counts, self._counts
        if counts == before:  # nearly always: nobody was admitted or preempted
            return NOTHING_COUNTED
        self._counts = counts.copy()
        return self._counts.since(before)

    def _result(self, step: Step) -> StepOutput:
        """What the oldest step gave."""
        if step.pending is None and not step.has_failed:  # behind one that failed, or interrupted
            step.batch = self.scheduler.renew(step.batch)
            if step.batch.is_empty:
                return StepOutput(())
            self._computer.submit(step)
        output = self._computer.result(step)
        return self._again(step) if output is None else output

    def _again(self, step: Step) -> StepOutput:
        """What the oldest step gives, which has failed, when its requests are computed one by one.
        So have those behind it, which have read what it may have written: each is then computed
        again, in its turn."""
        step.has_failed = True
        for other in list(self._in_flight)[1:]:
            self._computer.result(other)  # so that nothing runs any more
            other.has_failed = False  # it may, because of this one
        if len(step.batch.requests) == 1:
            return StepOutput((RequestResult(error=STEP_FAILED),))
        step.batch = self.scheduler.renew(step.batch)
        return self._computer.run_apart(step.batch, STEP_FAILED)

    def _update(self, step: Step, output: StepOutput) -> list[RequestUpdate]:
        """Raises RefusedOutput, with nothing changed, unless it is what the step was to give."""
        if step.batch.is_empty:
            return []
        return self.scheduler.update(
            step.batch, output, self._clock(), step.predicted_s, self._price
        )

    def _text_of(self, request: Request) -> "_Text | None":
        if self._decode is None or request.pooling is not None:
            return None
        try:
            detokenizer = Detokenizer(self._decode, request.prompt_token_ids, request.sampling)
        except STOPS_THE_PROCESS:
            raise
        except BaseException as error:  # a panic of a native library is not an Exception
            logger.exception("the prompt of request %s cannot be decoded", request.request_id)
            raise InvalidRequest("prompt", "the tokenizer cannot decode its tokens") from error
        return _Text(request, detokenizer, request.sampling.include_stop_str_in_output)

    def _with_text(self, update: RequestUpdate) -> RequestUpdate:
        """Add the text that became certain. A tokenizer that raises ends this request alone."""
        text = self._texts.get(update.request_id)
        if text is None:
            return update
        try:
            update = self._pushed(update, text)
        except STOPS_THE_PROCESS:
            raise
        except BaseException:
            logger.exception("the answer of request %s cannot be decoded", update.request_id)
            update = self._ended(update, FinishReason.ERROR, error=TEXT_FAILED)
        if update.finish_reason is not None:
            del self._texts[update.request_id]
        return update

    def _pushed(self, update: RequestUpdate, text: "_Text") -> RequestUpdate:
        """A stop string ends the request in this same step."""
        is_stop_token = update.finish_reason is FinishReason.STOP  # the scheduler knows no other
        delta = text.detokenizer.push(
            [token.token_id for token in update.tokens],
            is_last=update.finish_reason is not None,
            hide_last=is_stop_token and not text.shows_stop_token,
        )
        if delta.stop is None:
            return update._replace(text=delta.text) if delta.text else update
        self.scheduler.take_back(text.request, len(update.tokens) - delta.num_tokens)
        update = update._replace(text=delta.text, tokens=update.tokens[: delta.num_tokens])
        return self._ended(update, FinishReason.STOP, stop_reason=delta.stop)

    def _ended(
        self,
        update: RequestUpdate,
        reason: FinishReason,
        *,
        stop_reason: str | None = None,
        error: str | None = None,
    ) -> RequestUpdate:
        """The update as the final one, for a reason that only its text shows."""
        final = self.scheduler.end(update.request_id, reason, self._clock(), error=error)
        return update._replace(
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            timings=update.timings if final is None else final.timings,
        )

    def _record(self, step: Step) -> StepRecord:
        scheduler, batch, counted = self.scheduler, step.batch, step.counted
        start_time = max(step.start_time, self._last_end)  # while another ran, it waited
        self._last_end = self._clock()
        return StepRecord(  # by position: by name it takes four times as long
            start_time,
            self._last_end,
            batch.num_tokens,
            sum([len(r.token_ids) for r in batch.requests if not r.is_next_token]),  # of prompts
            len(batch.requests),
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.pool.num_free,
            scheduler.pool.num_blocks,
            counted.num_preemptions,
            counted.num_queried_tokens,
            counted.num_hit_tokens,
            batch.shape,
            tuple([r.request_id for r in batch.requests]),
            step.predicted_s,
            scheduler.step_drafts,
            scheduler.pool.counts,
        )
