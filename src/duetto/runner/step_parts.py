"""What a step is beside its forward pass: block moves before it, masks during it, drafts after it.

Shared by all runners, whenever they compute. Knows no logits.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from duetto.backends.backend import Backend
from duetto.core.batch import PLACEHOLDER, MoveResult, RequestResult, ScheduledBatch, StepOutput
from duetto.runner.masks import Constrained, Masks
from duetto.runner.proposers.drafters import Drafters
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.tiers.mover import Mover, TierRoom


class StepNeeds(NamedTuple):
    """What some request of a batch asks for: found in one walk, as nearly none asks."""

    drafts: bool
    placeholders: bool  # tokens that steps before it sample
    moves: bool
    looks: bool
    masks: bool


def needs_of(batch: ScheduledBatch) -> StepNeeds:
    drafts = placeholders = moves = looks = masks = False
    for request in batch.requests:
        drafts = drafts or request.drafting is not None
        placeholders = placeholders or request.token_ids[-1] == PLACEHOLDER
        moves = moves or bool(request.moves)
        looks = looks or request.look is not None
        if request.rows:
            masks = masks or request.rows[0].grammar is not None
    return StepNeeds(drafts, placeholders, moves, looks, masks)


class StepParts:
    """Belongs to one runner, and to the thread that runs its steps."""

    def __init__(
        self,
        backend: Backend,
        kv: Any,
        vocab_size: int,
        proposers: Mapping[str, Proposer] | None,
        tiers: TierRoom | None,
        masks: Masks | None,
    ) -> None:
        self.mover = None if tiers is None else Mover(backend, kv, tiers)
        self._drafters = Drafters(proposers or {}, vocab_size)
        self._masks = masks

    def move(self, batch: ScheduledBatch) -> float:
        """Do the step's block moves. Seconds."""
        return 0.0 if self.mover is None else self.mover.move(batch)

    def moved(self, awaits: Sequence[int] = ()) -> tuple[MoveResult, ...]:
        return () if self.mover is None else self.mover.results(awaits)

    def start_masks(self, batch: ScheduledBatch, needs: StepNeeds) -> Future[Constrained] | None:
        """Begin with the step's masks, once the results of all steps before it are there."""
        if needs.masks:
            assert self._masks is not None, "a grammar, and nothing that could follow it"
            return self._masks.start(batch.requests)
        if self.keeps_matchers and self._masks is not None:
            self._masks.start(())
        return None

    @property
    def keeps_matchers(self) -> bool:
        """Whether there are some that must hear of steps without grammars."""
        return self._masks is not None and self._masks.keeps_some

    def output(
        self, batch: ScheduledBatch, results: list[RequestResult], needs: StepNeeds
    ) -> StepOutput:
        """What the step gives, with drafts for the next one. Its placeholders must be known if it
        `needs.drafts`."""
        mask_s = drafting_s = 0.0
        if needs.masks and self._masks is not None:
            results = self._masks.with_drafts(batch.requests, results)
            mask_s = self._masks.mask_s
        if needs.drafts:
            results, drafting_s = self._drafters.propose(batch.requests, results)
        return StepOutput(tuple(results), drafting_s, mask_s=mask_s)
