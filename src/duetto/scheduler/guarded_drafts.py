"""A policy of drafts that may fail: what it raises costs the drafts, and no answer.

An error in it would end the engine's thread, and every request with it, for the sake of something
that only saves time. Knows what a policy is, and none in particular.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from duetto.core.request import Request
from duetto.core.shape import BatchShape
from duetto.scheduler.drafts import (
    NO_ASKS,
    NOTHING,
    Ask,
    Candidate,
    DraftOutcome,
    DraftPolicy,
    NoDrafts,
    Planned,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class GuardedDrafts:
    """Does as `policy` says until it raises. From then on nothing is drafted: what it knows of its
    requests may be half of what it should know."""

    is_on = True  # also afterwards: of the steps in flight it is still told what their drafts gave

    def __init__(self, policy: DraftPolicy) -> None:
        self._policy = policy

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        return self._guard(lambda it: it.choose(candidates, shape, room, limit_s), NOTHING)

    def ask(self, planned: Iterable[Planned]) -> Mapping[str, Ask]:
        return self._guard(lambda it: it.ask(planned), NO_ASKS)

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        self._guard(lambda it: it.learn(outcomes, drafting_s), None)

    def forget(self, request: Request) -> None:
        self._guard(lambda it: it.forget(request), None)

    def _guard(self, call: Callable[[DraftPolicy], T], otherwise: T) -> T:
        try:
            return call(self._policy)
        except Exception:
            logger.exception(
                "speculation is off from here on, as its policy failed; answers stay as they are"
            )
            self._policy = NoDrafts()
            return otherwise
