"""Drafts in virtual time: proposed out of nothing, right as often as is said, at a price.

How often they are right is an input, and which ones are is a hash of the request's seed and the
token's position: so the same input gives the same output, and a token that was drafted right once
would be again. What a draft model takes is the price of its own program. Who is asked for how many,
and how many are verified, is what the shipped policy (scheduler/adaptive_drafts.py) decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from duetto.core.batch import (
    RequestResult,
    SampledToken,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
)
from duetto.core.executor import Done
from duetto.core.shape import BatchShape, RequestShape, StepTime
from duetto.pricing.drafting import LearnedDraftingTime
from duetto.scheduler.adaptive_drafts import AdaptiveDrafts
from duetto.scheduler.drafts import DraftPolicy
from duetto.simulation.executor import BatchTime, token_of_seed
from duetto.simulation.looks import seen
from duetto.simulation.uniform import uniform
from duetto.simulation.virtual_clock import VirtualClock

WRONG = -(2**62)  # a token that nobody samples
MAX_REMEMBERED = 4096  # requests whose draft KV is kept account of


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDrafts:
    """What proposes in a simulation, and how well."""

    method: str
    max_drafts: int  # of one request in one step
    acceptance: tuple[float, ...]
    """Of the first, second, … draft of a chain: how often it is right if those before it are; the
    last one stands for all beyond."""
    draft_time: StepTime | None = None  # of a pass of the draft model; None: drafts cost nothing
    max_model_len: int | None = None  # of the draft model: longer requests get none from it
    make_policy: Callable[[StepTime], DraftPolicy] | None = None  # None: the shipped one

    def policy(self, step_time: StepTime) -> DraftPolicy:
        """A new one, which knows what a step takes and learns what proposing does."""
        if self.make_policy is not None:
            return self.make_policy(step_time)
        return AdaptiveDrafts({self.method: self.max_drafts}, SimulatedPrices(step_time))

    def is_right(self, seed: int, position: int, place: int) -> bool:
        """Whether the draft at this place of a chain is the token that the request samples there,
        given that those before it are."""
        chance = self.acceptance[min(place, len(self.acceptance) - 1)]
        return uniform(seed, position) < chance


class SpeculatingExecutor:
    """A SimulatedExecutor that verifies drafts and proposes new ones."""

    def __init__(self, batch_time: BatchTime, drafts: SimulatedDrafts, clock: VirtualClock) -> None:
        self._batch_time = batch_time
        self._drafts = drafts
        self._clock = clock
        self._written: dict[str, int] = {}  # tokens of which the draft model has right KV

    def submit(self, batch: ScheduledBatch) -> Done:
        self._clock.advance(self._batch_time(batch))
        tokens = [_verified(item) for item in batch.requests]
        proposed = [
            self._propose(item, len(own)) for item, own in zip(batch.requests, tokens, strict=True)
        ]
        drafting_s = self._drafting_s(batch.requests, tokens, proposed)
        self._clock.advance(drafting_s)
        looked = [() if each.look is None else seen(each, each.look) for each in batch.requests]
        results = tuple(
            [
                RequestResult(own, new, looked=told)
                for own, new, told in zip(tokens, proposed, looked, strict=True)
            ]
        )
        return Done(StepOutput(results, drafting_s))

    def _propose(self, item: ScheduledRequest, num_tokens: int) -> tuple[int, ...]:
        asked = item.drafting
        if asked is None or not asked.num_wanted or not num_tokens:
            return ()
        seed, known = item.rows[0].seed, _num_known(item, num_tokens)
        longest = self._drafts.max_model_len
        count = asked.num_wanted if longest is None else min(asked.num_wanted, longest - known)
        right = token_of_seed(seed)
        return tuple(
            [
                right if self._drafts.is_right(seed, known + place, place) else WRONG
                for place in range(count)
            ]
        )

    def _drafting_s(
        self,
        items: Sequence[ScheduledRequest],
        tokens: Sequence[Sequence[SampledToken]],
        proposed: Sequence[tuple[int, ...]],
    ) -> float:
        """Passes of the draft model: what each request has new, and then a token at a time."""
        price = self._drafts.draft_time
        if price is None:
            return 0.0
        passes: dict[int, list[RequestShape]] = {}
        for item, own, drafts in zip(items, tokens, proposed, strict=True):
            if item.drafting is None:
                continue
            for number, shape in enumerate(self._passes(item, len(own), drafts)):
                passes.setdefault(number, []).append(shape)
        return sum(price(BatchShape(tuple(shapes))) for shapes in passes.values())

    def _passes(
        self, item: ScheduledRequest, num_tokens: int, drafts: Sequence[int]
    ) -> list[RequestShape]:
        assert item.drafting is not None
        end = item.drafting.start + len(item.drafting.token_ids)
        if drafts:  # it is sent all, and what the step sampled
            end = _num_known(item, num_tokens)
        start = min(self._start(item), end - 1)
        first = RequestShape(end - start, start, int(bool(drafts)))
        more = [RequestShape(1, end + number, 1) for number in range(len(drafts) - 1)]
        # Of its own drafts those stay that turn out right: what follows a wrong one is not.
        right = token_of_seed(item.rows[0].seed) if drafts else 0
        num_right = next((i for i, d in enumerate(drafts) if d != right), len(drafts))
        self._remember(item.request_id, end + min(num_right, len(more)))
        return [first, *more] if first.num_new > 0 else more

    def _start(self, item: ScheduledRequest) -> int:
        """Tokens of which there is KV: those it has, or those that the target found in its prefix
        cache, where the draft's are too."""
        assert item.drafting is not None
        if not item.drafting.start:
            self._written.pop(item.request_id, None)
        return self._written.get(item.request_id, item.num_computed_tokens)

    def _remember(self, request_id: str, num_tokens: int) -> None:
        self._written.pop(request_id, None)
        self._written[request_id] = num_tokens
        if len(self._written) > MAX_REMEMBERED:
            del self._written[next(iter(self._written))]


def _verified(item: ScheduledRequest) -> tuple[SampledToken, ...]:
    """The request's own token for each draft that is right, and once more."""
    if not item.rows:
        return ()
    right, num_right = token_of_seed(item.rows[0].seed), 0
    for draft in item.token_ids[len(item.token_ids) - item.num_drafts :]:
        if draft != right:
            break
        num_right += 1
    return (SampledToken(right),) * (num_right + 1)


def _num_known(item: ScheduledRequest, num_tokens: int) -> int:
    """Tokens of the request once the step has sampled so many."""
    return item.end - item.num_drafts + num_tokens


class SimulatedPrices:
    """What the policy asks (DraftPrices): steps at their very price, proposing as it was learned.

    A step is priced at 1, 2, 4, … more rows, and what lies between on a straight line: a roofline
    is one almost everywhere.
    """

    def __init__(self, step_time: StepTime) -> None:
        self._step_time = step_time
        self._drafting = LearnedDraftingTime()

    def row_times(self, shape: BatchShape, num_more: int) -> Sequence[float]:
        known = {0: self._step_time(shape)}
        count = 1
        while num_more and max(known) < num_more:
            count = min(count, num_more)
            known[count] = self._step_time(_with_rows(shape, count))
            count *= 2
        times = [known[0]]
        for low, high in zip(known, list(known)[1:], strict=False):
            slope = (known[high] - known[low]) / (high - low)
            times += [known[low] + slope * (n - low) for n in range(low + 1, high + 1)]
        return times

    def hopeful_row_times(self, shape: BatchShape, num_more: int) -> Sequence[float]:
        return self.row_times(shape, num_more)

    def drafting_prices(self, method: str) -> tuple[float, float, float, float]:
        return self._drafting.prices(method)

    def observe_drafting(self, work: Mapping[str, tuple[int, int, int]], seconds: float) -> None:
        self._drafting.observe(work, seconds)


def _with_rows(shape: BatchShape, count: int) -> BatchShape:
    """With so many drafts, as evenly as may be among the requests of one token."""
    streams = [i for i, each in enumerate(shape.requests) if each.num_new == 1] or [0]
    each, rest = divmod(count, len(streams))
    requests = list(shape.requests)
    for number, index in enumerate(streams):
        more, one = each + (number < rest), requests[index]
        requests[index] = one._replace(
            num_new=one.num_new + more, num_logit_rows=one.num_logit_rows + more
        )
    return BatchShape(tuple(requests))
