"""A policy is told of drafts that were proposed and not verified."""

from collections.abc import Mapping, Sequence

from fakes import make_request
from scheduler.scripted import SMALL

from duetto.core.batch import RequestResult, SampledToken, ScheduledBatch, StepOutput
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.core.shape import BatchShape
from duetto.scheduler.drafts import Ask, Candidate, DraftOutcome, Planned
from duetto.scheduler.scheduler import Scheduler


class Asks:
    """Verifies nothing, and asks one method after the other."""

    is_on = True

    def __init__(self, *methods: str) -> None:
        self._methods = list(methods)
        self.learned: list[DraftOutcome] = []

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        return {}

    def ask(self, planned: Sequence[Planned]) -> Mapping[str, Ask]:
        method = self._methods.pop(0) if self._methods else ""
        return {p.request.request_id: Ask(method, min(2, p.num_left)) for p in planned if method}

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        self.learned += outcomes

    def forget(self, request: Request) -> None:
        pass


def step(scheduler: Scheduler, drafts: tuple[int, ...] = ()) -> ScheduledBatch:
    batch = scheduler.schedule(0.0)
    result = RequestResult((SampledToken(7),), drafts)
    scheduler.update(batch, StepOutput((result,)), 0.0)
    return batch


def test_drafts_that_were_not_verified_are_told_of_too() -> None:
    """What is sampled in their place says whether they were right, at no cost."""
    policy = Asks("a")
    scheduler = Scheduler(SchedulerConfig(**SMALL), drafts=policy)
    scheduler.add(make_request(max_tokens=9))
    step(scheduler, drafts=(7, 8))
    policy.learned.clear()
    step(scheduler)  # asks for nothing, verifies nothing
    (outcome,) = policy.learned
    assert (outcome.num_drafts, outcome.tokens, outcome.ask) == (0, (7,), None)
    policy.learned.clear()
    step(scheduler)
    assert not policy.learned
