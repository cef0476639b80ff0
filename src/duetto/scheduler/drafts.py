"""How many drafts a step verifies, and who is asked for how many more.

Knows token ids, prices of steps and how often drafts were right. Knows no models, no text, no
blocks and no clock. A policy only decides what is tried: whatever it answers, each request's tokens
are the same (docs/design/speculation.md).

The order within a step: `choose` once, when next tokens and chunks have their part of the budget;
`ask` once, for the requests of the plan; `learn` once, when the step's results are in.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from duetto.core.request import Request
from duetto.core.shape import BatchShape

NOTHING: Mapping[str, int] = MappingProxyType({})


class Candidate(NamedTuple):
    """A request of the step that samples a next token, and what was proposed to follow it."""

    request: Request
    drafts: tuple[int, ...]  # one or more; fewer than the outputs that the request has left


class Planned(NamedTuple):
    """A request of the step, once it is known what it computes."""

    request: Request
    num_left: int  # drafts that may still be of use after this step; 0: it samples nothing now, or
    # is about to end. A request that samples now and may get m outputs in all still: m - 2.
    num_unsent: int  # tokens (known before the step) that the proposer asked last has not been sent


class Ask(NamedTuple):
    """A proposer is to be sent a request's tokens, and to propose drafts after the step."""

    method: str
    num_wanted: int  # drafts; 0: it only keeps up with the tokens
    max_sent: int | None = None  # tokens sent to it in this step; None: all. Drafts need all


class DraftOutcome(NamedTuple):
    """What a step with drafts, or with an `Ask`, gave one request."""

    request: Request
    num_drafts: int  # that were verified
    tokens: tuple[int, ...]  # sampled: the accepted drafts, and the token after them
    ask: Ask | None = None  # what `ask` said in this step
    num_sent: int = 0  # tokens that went to the proposer
    num_proposed: int = 0  # drafts that came back


NO_ASKS: Mapping[str, Ask] = MappingProxyType({})


class DraftPolicy(Protocol):
    """Decides about drafts. One thread calls it, in the order above; it keeps a little state per
    request until `forget`."""

    def choose(
        self,
        candidates: Sequence[Candidate],
        shape: BatchShape,
        room: int,
        limit_s: float | None = None,
    ) -> Mapping[str, int]:
        """How many of its drafts each request verifies in this step: the first ones. Requests that
        are missing verify none.

        `shape` is the step's without drafts. `room` is the most drafts of all together. `limit_s`
        is what the step may take, where `--target-itl` sets one. Called where there are candidates,
        also if there is no room.
        """
        ...

    @property
    def is_on(self) -> bool:
        """False: `ask` never asks for anything, so that nothing need be gathered to call it."""
        ...

    def ask(self, planned: Iterable[Planned]) -> Mapping[str, Ask]:
        """Whom to ask for drafts after this step. Requests that are missing are not asked for, and
        nothing is spent on them. `planned` is the whole step, requests within prompts too; it is
        made while it is read, once, so that a policy which has nothing to ask need not pay for it.
        """
        ...

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        """What came of a step: one outcome for each request that was a candidate or was asked for.
        `drafting_s` is what all of its proposing took; of a grammar's drafts, what a row's mask
        took. Not called if there are none."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended."""
        ...


class NoDrafts:
    """Speculation is off: costs nothing."""

    is_on = False

    def choose(
        self,
        candidates: Sequence[Candidate],  # noqa: ARG002
        shape: BatchShape,  # noqa: ARG002
        room: int,  # noqa: ARG002
        limit_s: float | None = None,  # noqa: ARG002
    ) -> Mapping[str, int]:
        return NOTHING

    def ask(self, planned: Iterable[Planned]) -> Mapping[str, Ask]:  # noqa: ARG002
        return NO_ASKS

    def learn(self, outcomes: Sequence[DraftOutcome], drafting_s: float) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass
