"""A policy of drafts that decides at random, and checks what it is told."""

from collections.abc import Mapping, Sequence
from random import Random

from duetto.core.request import Request
from duetto.core.shape import BatchShape
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, Planned


class Guesses:
    is_on = True

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self._chosen: dict[str, int] = {}
        self._asked: dict[str, list[tuple[Request, Ask]]] = {}
        self.num_ended = 0

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        """Sometimes more than there is room for."""
        assert room >= 0 and shape.requests
        assert limit_s is None or limit_s > 0
        for request, drafts in candidates:
            assert 0 < len(drafts) < request.num_outputs_left, "drafts of no use"
            assert not request.num_in_flight
        return {
            request.request_id: self._rng.randint(0, len(drafts) + 1)
            for request, drafts in candidates
            if self._rng.random() < 0.8
        }

    def ask(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        asks = {}
        for request, num_left, num_unsent in planned:
            assert 0 <= num_left <= max(0, request.num_outputs_left - 2)
            assert 0 <= num_unsent <= request.num_tokens
            draw = self._rng.random()
            if draw < 0.7:
                ask = Ask(self._method(), self._rng.randint(0, min(num_left, 4)))
                asks[request.request_id] = ask
            elif draw < 0.8:
                asks[request.request_id] = Ask(self._method(), 0, self._rng.randint(0, num_unsent))
            if request.request_id in asks:
                waiting = self._asked.setdefault(request.request_id, [])
                waiting.append((request, asks[request.request_id]))
        return asks

    def _method(self) -> str:
        """One proposer mostly; whoever is asked for the first time begins anew."""
        return "guess" if self._rng.random() < 0.8 else "other guess"

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        assert outcomes and drafting_s >= 0
        for outcome in outcomes:
            assert len(outcome.tokens) <= outcome.num_drafts + 1
            is_of_drafts = outcome.num_drafts or outcome.request.drafts
            assert is_of_drafts or outcome.ask is not None, "told of nothing"
            if outcome.ask is not None:
                request, _ = self._asked[outcome.request.request_id].pop(0)
                assert request is outcome.request
                assert outcome.num_proposed <= outcome.ask.num_wanted

    def forget(self, request: Request) -> None:
        assert request.finish_reason is None, "told of an end twice"
        self._asked.pop(request.request_id, None)
        self.num_ended += 1
