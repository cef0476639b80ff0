"""Lets an executor compute a step, and outlasts what goes wrong in it.

A step that raises is computed again request by request, and the one that raises alone fails alone.
That gives the same answers: a request's row is the same alone as in a batch; no request of a step
reads what another one writes in it; and what the failed step wrote went into blocks that nobody
else sees, and is written again. A step of n requests is at most n + 1 computations, whatever
fails, as whoever fails alone has ended. Knows no scheduling and no text.
"""

import logging
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from duetto.core.batch import RequestResult, ScheduledBatch, StepOutput
from duetto.core.errors import STOPS_THE_PROCESS
from duetto.core.executor import Executor
from duetto.core.shape import BatchShape
from duetto.scheduler.accept import check_whole

logger = logging.getLogger(__name__)


class StepTimes(Protocol):
    """What steps should take: asked before each, told after. Decides nothing that is answered."""

    def step_time(self, shape: BatchShape) -> float:
        """Seconds."""
        ...

    def has_measured(self, shape: BatchShape) -> bool:
        """Whether steps of about this size were measured; if not, `step_time` is a guess."""
        ...

    def observe(self, shape: BatchShape, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Computing:
    """A computation under way, as it is seen from other threads. No two are equal."""

    num_requests: int
    predicted_s: float | None  # None: nothing is known of it
    is_measured: bool = False  # steps of about this size were measured before


class Computed(NamedTuple):
    output: StepOutput  # whole: each request has all that it was to get, or has failed
    predicted_s: float | None  # for the batch in one computation
    is_at_once: bool  # one computation was enough


class Computer:
    """Runs batches on one executor, on one thread."""

    def __init__(self, executor: Executor, step_times: StepTimes | None) -> None:
        self._executor = executor
        self._times = step_times
        self.current: Computing | None = None  # may be read by any thread

    def run(self, batch: ScheduledBatch, message: str) -> Computed:
        """`message` is what may be shown of a request that failed."""
        predicted_s = None if self._times is None else self._times.step_time(batch.shape)
        try:
            return Computed(self._compute(batch, predicted_s), predicted_s, True)
        except STOPS_THE_PROCESS:
            raise
        except BaseException:  # a panic of a native library is not an Exception
            logger.exception("a step of %d requests failed", len(batch.requests))
        if len(batch.requests) == 1:
            output = StepOutput((RequestResult(error=message),))
        else:
            output = self._run_apart(batch, message)
        return Computed(output, predicted_s, False)

    def _run_apart(self, batch: ScheduledBatch, message: str) -> StepOutput:
        results: list[RequestResult] = []
        drafting_s = 0.0
        for request in batch.requests:
            alone = ScheduledBatch((request,))
            predicted_s = None if self._times is None else self._times.step_time(alone.shape)
            try:
                output = self._compute(alone, predicted_s)
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

    def _compute(self, batch: ScheduledBatch, predicted_s: float | None) -> StepOutput:
        """Raises whatever the executor raises, and EngineError if it returned too little."""
        is_measured = self._times is not None and self._times.has_measured(batch.shape)
        self.current = Computing(len(batch.requests), predicted_s, is_measured)
        try:
            output = self._executor.submit(batch).result()
        finally:
            self.current = None
        check_whole(batch, output)
        return output
