"""Instruments of the tests of speculation: bad proposers, a policy that verifies whatever it can,
and an executor with steps in flight."""

from collections import deque
from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from duetto.core.batch import PLACEHOLDER, ScheduledBatch, StepOutput
from duetto.core.executor import Executor
from duetto.core.request import Request
from duetto.core.shape import BatchShape
from duetto.runner.proposers.proposer import DraftRequest
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, Planned


class Raises:
    """A proposer that fails whenever it is asked for drafts."""

    needs_hidden = False

    def propose(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...]]:
        if any(request.num_wanted for request in requests):
            raise RuntimeError("planted")
        return [()] * len(requests)


class Nonsense:
    """A proposer of what is no draft: ids out of range, too many, of other types, too few rows."""

    needs_hidden = False

    def __init__(self, vocab_size: int) -> None:
        self._kinds = ((-1,), (vocab_size,), (2**40,), (1,) * 99, (1.5,), ("a",), None, 7)
        self._turn = 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[object]:
        self._turn += 1
        answers = [self._kinds[(self._turn + i) % len(self._kinds)] for i in range(len(requests))]
        return answers if self._turn % 5 else answers[1:]


class Tally:
    """What came of drafts."""

    def __init__(self) -> None:
        self.num_proposed = self.num_verified = self.num_accepted = 0
        self.longest = 0  # run of accepted drafts

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        assert outcomes and drafting_s >= 0
        for outcome in outcomes:
            self.num_proposed += outcome.num_proposed
            if outcome.num_drafts and outcome.tokens:
                self.num_verified += outcome.num_drafts
                self.num_accepted += len(outcome.tokens) - 1
                self.longest = max(self.longest, len(outcome.tokens) - 1)

    @property
    def num_rejected(self) -> int:
        return self.num_verified - self.num_accepted


class TakesAll(Tally):
    """A policy that asks nobody, and verifies what there is."""

    is_on = True

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        return {request.request_id: len(drafts) for request, drafts in candidates}

    def ask(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        return {}

    def forget(self, request: Request) -> None:
        pass


class Eager(Tally):
    """A policy that asks for up to `most` drafts and verifies what it gets, mostly: how many, and
    which proposer is asked, are drawn."""

    is_on = True

    def __init__(self, methods: Sequence[str], most: int = 4, seed: int = 0) -> None:
        super().__init__()
        self._methods, self._most, self._rng = list(methods), most, Random(seed)

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        few = self._rng.random() < 0.2
        return {
            request.request_id: self._rng.randint(0, len(drafts)) if few else len(drafts)
            for request, drafts in candidates
        }

    def ask(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        asks = {}
        for request, num_left, num_unsent in planned:
            method, draw = self._rng.choice(self._methods), self._rng.random()
            most = min(num_left, self._most)
            if draw < 0.8:
                asks[request.request_id] = Ask(method, most)
            elif draw < 0.9:
                asks[request.request_id] = Ask(method, 0, self._rng.randint(0, num_unsent))
        return asks

    def forget(self, request: Request) -> None:
        pass


class _Later(NamedTuple):
    executor: "InFlight"

    def result(self) -> StepOutput:
        return self.executor.run_next()


class InFlight:
    """Computes a step when its result is asked for, as a device that is behind does."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._waiting = deque[ScheduledBatch]()
        self.num_placeholders = 0

    def submit(self, batch: ScheduledBatch) -> _Later:
        self._waiting.append(batch)
        self.num_placeholders += sum(PLACEHOLDER in r.token_ids for r in batch.requests)
        return _Later(self)

    def run_next(self) -> StepOutput:
        return self._executor.submit(self._waiting.popleft()).result()
