"""How many of the drafts that a grammar makes follow a step verifies: as many as pay.

A grammar may let one text only follow, and more than one way to spell it: the drafts spell it with
the longest tokens, as models do nearly always. So they are right nearly always, which is learned
here and not supposed: for each request, beside what its tenant's requests have shown, and apart
from what proposers have shown. Nobody is asked for them, so nothing is spent where none pay.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from duetto.core.draft_counts import GRAMMAR
from duetto.core.request import Request
from duetto.core.shape import BatchShape
from duetto.scheduler.drafted import DraftedRequests
from duetto.scheduler.drafts import NO_ASKS, NOTHING, Ask, Candidate, DraftOutcome, Planned
from duetto.scheduler.worth import best_to_verify, counts_of, ranked

_NEWEST = 0.1  # what the last step counts in the price of a mask
RowTimes = Callable[[BatchShape, int], Sequence[float]]  # as DraftPrices.row_times


class GrammarDrafts:
    """A DraftPolicy that asks nobody. State is bounded by the requests that live."""

    is_on = True

    def __init__(self, row_times: RowTimes) -> None:
        self._row_times = row_times
        self._mask_s = 0.0  # of a row
        self._requests = DraftedRequests()

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        slots = ranked([self._line(candidate) for candidate in candidates])
        most = min(len(slots.chances), room)
        if most <= 0:
            return NOTHING
        times = self._row_times(shape, most)
        # A draft has a mask of its own, which takes longer than its row where a model is small.
        times = [t + n * self._mask_s for n, t in enumerate(times)]
        extra_s = [t - times[0] for t in times if limit_s is None or t <= limit_s]
        if len(extra_s) < 2 or times[0] <= 0.0:  # a price of nothing: no step was seen yet
            return NOTHING
        # A chunk of a prompt must not make drafts look cheap beside it.
        alone = tuple([each for each in shape.requests if each.num_new == 1])
        has_others = 0 < len(alone) < len(shape.requests)
        plain_s = self._row_times(BatchShape(alone), 0)[0] if has_others else times[0]
        count = best_to_verify(slots.chances, extra_s, max(1, len(alone)), plain_s, 0.0).num_slots
        counts = counts_of(slots.owners[:count], len(candidates))
        return {c.request.request_id: n for c, n in zip(candidates, counts, strict=True) if n}

    def ask(self, planned: Iterable[Planned]) -> Mapping[str, Ask]:  # noqa: ARG002
        return NO_ASKS

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        """`drafting_s` is what a row's mask took in the step: all that is spent on a draft beside
        its row."""
        if drafting_s > 0.0:
            newest = _NEWEST if self._mask_s else 1.0
            self._mask_s += newest * (drafting_s - self._mask_s)
        for outcome in outcomes:
            drafted = self._requests.find(outcome.request)
            if drafted is not None and drafted.drafts:
                drafted.compare(outcome.tokens)

    def forget(self, request: Request) -> None:
        self._requests.forget(request)

    def _line(self, candidate: Candidate) -> Sequence[float]:
        """The probabilities that its drafts are reached and right."""
        drafted = self._requests.of(candidate.request)
        drafted.drafts = candidate.drafts  # compared with what comes, verified or not
        drafted.acceptance = self._requests.acceptance(drafted, GRAMMAR)
        return drafted.acceptance.survivals(len(candidate.drafts))
