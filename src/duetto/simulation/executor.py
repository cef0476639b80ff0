"""An Executor that spends virtual time instead of computing.

Knows a price for a batch's shape, and no model: the price may come from a CostModel, from a fit, or
from steps that were recorded. Its tokens stand for no text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import TypeVar

from duetto.core.batch import (
    PLACEHOLDER,
    RequestResult,
    SampledToken,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
)
from duetto.core.executor import Done
from duetto.core.request import Request
from duetto.core.shape import BatchShape, RequestShape, StepTime
from duetto.pricing.cost_model import CostModel, StepTotals
from duetto.simulation.looks import seen
from duetto.simulation.virtual_clock import VirtualClock

T = TypeVar("T")
# For requests with so many tokens before their next one: the times of steps that compute one token
# of each, step after step without end. Exactly what a StepTime says of their shapes.
NextPrices = Callable[[Sequence[int]], Iterator[T]]
NextTokenTimes = NextPrices[float]
BatchTime = Callable[[ScheduledBatch], float]


class SimulatedExecutor:
    """Answers every request with its own token, again and again, after the time of the step."""

    def __init__(self, batch_time: BatchTime, clock: VirtualClock) -> None:
        self._batch_time = batch_time
        self._clock = clock

    def submit(self, batch: ScheduledBatch) -> Done:
        self._clock.advance(self._batch_time(batch))
        return Done(answers(batch))


def by_shape(step_time: StepTime) -> BatchTime:
    """What a batch takes of which only the shape counts: no KV is moved, and nothing looked at."""
    return lambda batch: step_time(batch.shape)


def answers(batch: ScheduledBatch) -> StepOutput:
    """The token of every request that is to be given one."""
    return StepOutput(tuple([_answer(item) for item in batch.requests]))


def _answer(item: ScheduledRequest) -> RequestResult:
    looked = () if item.look is None else seen(item, item.look)
    if not item.rows:
        return RequestResult(looked=looked)
    return RequestResult((SampledToken(token_of_seed(item.rows[0].seed)),), looked=looked)


def step_by_step(price: Callable[[BatchShape], T]) -> NextPrices[T]:
    """As `price` says, shape by shape: the slow twin of `next_token_prices`."""

    def prices(pasts: Sequence[int]) -> Iterator[T]:
        for step in count():
            yield price(BatchShape(tuple([RequestShape(1, past + step) for past in pasts])))

    return prices


def next_token_times(model: CostModel) -> NextTokenTimes:
    """As `model.step_time` says."""
    return next_token_prices(model, model.time_of)


def next_token_prices(model: CostModel, price: Callable[[StepTotals], T]) -> NextPrices[T]:
    """`price` of the totals of steps that compute one token of each request, one after the other.
    Where no attention has a window, the sums that a price depends on grow by one a request and
    step, so shapes need not be made."""
    if any(op.kv is not None and op.kv.window is not None for op in model.program.ops):
        return step_by_step(lambda shape: price(model.totals(shape)))

    def prices(pasts: Sequence[int]) -> Iterator[T]:
        totals = model.totals(BatchShape(tuple([RequestShape(1, past) for past in pasts])))
        num_requests, spans = len(pasts), totals.spans
        while True:
            yield price(totals)
            spans = tuple([(p + num_requests, r + num_requests) for p, r in spans])
            totals = totals._replace(spans=spans)

    return prices


def replayed(durations: Iterable[float]) -> StepTime:
    """The price of each step is the next of `durations`, whatever its shape. Not pure: only for a
    simulation that does not fast-forward."""
    times = iter(durations)
    return lambda _shape: next(times)


def token_of(request: Request) -> int:
    """The token that a simulated executor gives this request: no prompt has it, and no request of
    another seed does."""
    return token_of_seed(request.seed)


def token_of_seed(seed: int) -> int:
    return PLACEHOLDER - 1 - seed
