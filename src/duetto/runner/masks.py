"""What grammars let follow, for each row of a step; made on a thread while the backend computes.

A mask is a function of the grammar and the tokens of the answer. Matchers are kept between steps,
so that each is asked to go on by a token only; one that is not there, or that has followed other
tokens, goes back or begins anew, and tells the same. Knows no logits and no grammars' text.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple

from duetto.core.batch import RequestResult, SamplingInput, ScheduledRequest
from duetto.core.errors import EngineError
from duetto.core.structured import Grammar
from duetto.grammars.compile import CompiledGrammars
from duetto.grammars.matcher import Matcher
from duetto.runner.sampler import RowConstraint

NUM_STEPS_KEPT = 64  # after which a matcher goes that nobody asked
MAX_GRAMMAR_DRAFTS = 16  # of a request in a step: acceptance is learned of so many places


class ConstrainedRows(NamedTuple):
    """Of a request's rows, the first ones: behind a draft that cannot be sampled there are none,
    nor behind one that ends the answer."""

    rows: tuple[RowConstraint, ...]
    error: str | None = None  # why there is not even one


Constrained = dict[str, ConstrainedRows]  # by request; those without a grammar are not there


@dataclass(slots=True)
class _Kept:
    key: str  # of the grammar
    matcher: Matcher
    last_step: int


class Masks:
    """Belongs to one runner, and to the thread that runs its steps."""

    def __init__(self, grammars: CompiledGrammars) -> None:
        self._grammars = grammars
        self._kept: dict[str, _Kept] = {}  # by request
        self._num_steps = 0
        self.mask_s = 0.0  # what a row took in the last step; to be read when its result is there
        self._thread = ThreadPoolExecutor(1, "duetto-masks")

    def for_another(self) -> "Masks":
        """Of the same grammars, for another runner."""
        return Masks(self._grammars)

    @property
    def keeps_some(self) -> bool:
        """Whether there are matchers that may go some steps later, of which `start` must hear."""
        return bool(self._kept)

    def start(self, requests: Sequence[ScheduledRequest]) -> Future[Constrained]:
        """Begin with the masks of a step. Until its result is asked for, nothing else is."""
        return self._thread.submit(self._make, requests)

    def with_drafts(
        self, requests: Sequence[ScheduledRequest], results: Sequence[RequestResult]
    ) -> list[RequestResult]:
        """The results, with drafts where the grammar lets one text only follow what was sampled."""
        drafted = list(results)
        for place, (request, result) in enumerate(zip(requests, results, strict=True)):
            if result.tokens and request.rows[0].grammar is not None:
                drafts = self._drafts(request, [token.token_id for token in result.tokens])
                if drafts:
                    drafted[place] = result._replace(grammar_drafts=drafts)
        return drafted

    def _drafts(self, request: ScheduledRequest, sampled: list[int]) -> tuple[int, ...]:
        first = request.rows[0]
        kept = self._kept.get(request.request_id)
        # The one that is sampled after them is no draft, and one was sampled in this step.
        most = min(MAX_GRAMMAR_DRAFTS, first.num_left - len(sampled) - 1)
        if kept is None or most <= 0:
            return ()
        try:
            if kept.matcher.seek((*first.output_token_ids, *sampled)):
                return kept.matcher.what_must_follow(most)
        except EngineError:
            del self._kept[request.request_id]  # the next step says what is wrong
        return ()

    def _make(self, requests: Sequence[ScheduledRequest]) -> Constrained:
        self._num_steps += 1
        begun = perf_counter()
        made = {r.request_id: self._of(r) for r in requests if r.rows and r.rows[0].grammar}
        num_rows = sum([len(each.rows) for each in made.values()])
        self.mask_s = (perf_counter() - begun) / max(1, num_rows)
        oldest = self._num_steps - NUM_STEPS_KEPT
        for request_id in [i for i, kept in self._kept.items() if kept.last_step < oldest]:
            del self._kept[request_id]
        return made

    def _of(self, request: ScheduledRequest) -> ConstrainedRows:
        rows: list[RowConstraint] = []
        try:
            matcher = self._matcher(request.request_id, request.rows[0].grammar)
            for sampling in request.rows:
                if not matcher.seek(sampling.output_token_ids):
                    break  # the draft before it is wrong, or ends the answer
                steer = partial(_steered, matcher, sampling)
                rows.append(RowConstraint(matcher.ceiling(), steer))
                matcher.watches(sampling.num_left)  # what it must know for it, it finds out here
        except EngineError as error:
            del self._kept[request.request_id]  # it is of no more use
            return ConstrainedRows(tuple(rows), None if rows else str(error))
        if not rows:
            return ConstrainedRows((), "the answer is not one of its grammar any more")
        return ConstrainedRows(tuple(rows))

    def _matcher(self, request_id: str, grammar: Grammar | None) -> Matcher:
        assert grammar is not None
        kept = self._kept.get(request_id)
        if kept is None or kept.key != grammar.key:
            kept = _Kept(grammar.key, self._grammars.matcher(grammar), self._num_steps)
            self._kept[request_id] = kept
        kept.last_step = self._num_steps
        return kept.matcher


def _steered(matcher: Matcher, sampling: SamplingInput, token_id: int) -> int:
    return matcher.steered(sampling.output_token_ids, token_id, sampling.num_left)
