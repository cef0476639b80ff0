"""Lets an executor compute steps, and outlasts what goes wrong in them.

A step that raises is computed again request by request, and the one that raises alone fails alone.
That gives the same answers: a request's row is the same alone as in a batch; no request of a step
reads what another one writes in it; and what the failed step wrote went into blocks that nobody
else sees, and is written again. A step of n requests is at most n + 1 computations, whatever
fails, as whoever fails alone has ended. Steps in flight behind it have read what it may have
written: the engine computes them again too, after it. Knows no scheduling and no text.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from duetto.core.batch import RequestResult, ScheduledBatch, StepOutput
from duetto.core.errors import STOPS_THE_PROCESS
from duetto.core.executor import Executor, Pending
from duetto.core.shape import BatchShape
from duetto.scheduler.accept import check_whole
from duetto.scheduler.counts import SchedulerCounts

logger = logging.getLogger(__name__)


class StepTimes(Protocol):
    """What steps should take: asked before each, told after. Decides nothing that is answered."""

    def step_time(self, shape: BatchShape) -> float:
        """Seconds."""
        ...

    def has_measured(self, shape: BatchShape) -> bool:
        """Whether steps of about this size were measured; if not, `step_time` is a guess. Any
        thread may ask."""
        ...

    def observe(self, shape: BatchShape, seconds: float) -> None: ...


@dataclass(slots=True, eq=False)
class Computing:
    """A computation under way, as other threads see it: nobody changes it. No two are equal."""

    shape: BatchShape
    predicted_s: float | None = None  # None: nothing is known of it
    times: StepTimes | None = None  # that predicted it

    @property
    def num_requests(self) -> int:
        return len(self.shape.requests)

    @property
    def is_measured(self) -> bool:
        """Whether steps of about this size were measured: asked when a watch wants to know, which
        is seldom, and not before each step."""
        return self.times is not None and self.times.has_measured(self.shape)


@dataclass(slots=True, eq=False)
class Step:
    """A step, from its plan to its result."""

    batch: ScheduledBatch
    start_time: float
    counted: SchedulerCounts  # while it was planned
    predicted_s: float | None = None  # for the batch in one computation
    pending: Pending | None = None  # None: it must be computed, perhaps again
    computing: Computing | None = None
    has_failed: bool = False  # it raised, as a whole


class Computer:
    """Runs steps on one executor, on one thread."""

    def __init__(self, executor: Executor, step_times: StepTimes | None) -> None:
        self._executor = executor
        self._times = step_times
        self.current: Computing | None = None  # may be read by any thread

    def wrap(self, wrap: Callable[[Executor], Executor]) -> None:
        """What `wrap` makes of the executor runs all steps from now on."""
        self._executor = wrap(self._executor)

    def submit(self, step: Step) -> None:
        """Steps run in the order in which they are submitted. Raises only what ends the process."""
        step.computing = self._computing(step.batch)
        step.predicted_s = step.computing.predicted_s
        self.current = step.computing
        try:
            step.pending = self._executor.submit(step.batch)
        except STOPS_THE_PROCESS:
            raise
        except BaseException:  # a panic of a native library is not an Exception
            logger.exception("a step of %d requests failed", len(step.batch.requests))
            step.has_failed = True
        finally:
            self.current = None

    def result(self, step: Step) -> StepOutput | None:
        """What a step gave, whole or not; None if it raised. Raises only what ends the process."""
        if step.has_failed or step.pending is None:
            return None
        self.current, pending, step.pending = step.computing, step.pending, None
        try:
            return pending.result()
        except STOPS_THE_PROCESS:
            raise
        except BaseException:
            logger.exception("a step of %d requests failed", len(step.batch.requests))
            step.has_failed = True
            return None
        finally:
            self.current = None

    def run_apart(self, batch: ScheduledBatch, message: str) -> StepOutput:
        """Compute a step that failed, request by request. `message` is what may be shown of those
        that fail alone too."""
        results: list[RequestResult] = []
        drafting_s = 0.0
        for request in batch.requests:
            try:  # the executor does moves once: those that it has done, it passes over
                output = self._compute(replace(batch, requests=(request,)))
            except STOPS_THE_PROCESS:
                raise
            except BaseException as error:
                # One traceback of a kind will do: the step's own stands above.
                logger.error("request %s fails alone too: %r", request.request_id, error)
                results.append(RequestResult(error=message))
            else:
                results += output.results
                drafting_s += output.drafting_s
        logger.warning(
            "its requests were computed one by one: %d of %d failed",
            sum(result.error is not None for result in results),
            len(batch.requests),
        )
        return StepOutput(tuple(results), drafting_s)

    def _compute(self, batch: ScheduledBatch) -> StepOutput:
        """Raises whatever the executor raises, and EngineError if it returned too little."""
        self.current = self._computing(batch)
        try:
            output = self._executor.submit(batch).result()
        finally:
            self.current = None
        check_whole(batch, output)
        return output

    def _computing(self, batch: ScheduledBatch) -> Computing:
        if self._times is None:
            return Computing(batch.shape)
        return Computing(batch.shape, self._times.step_time(batch.shape), self._times)
