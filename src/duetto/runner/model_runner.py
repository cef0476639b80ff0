"""The real Executor: a scheduled batch to arrays, to a backend's logits, to tokens.

Keeps nothing about a request: what a step needs comes with its batch, and what outlives a step is
KV in blocks, and what the last steps sampled. Knows no schedule, no text and no architecture.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from duetto.backends.backend import Backend, FloatArray
from duetto.backends.blocks import Bytes
from duetto.core.batch import RequestResult, ScheduledBatch, StepOutput
from duetto.core.executor import Done
from duetto.program.dtype import KVDtype
from duetto.program.kv_size import MAX_SLOTS
from duetto.program.program import Program
from duetto.runner.looks import look
from duetto.runner.masks import Constrained, Masks
from duetto.runner.placeholders import LastSteps
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.results import results_of
from duetto.runner.step_arrays import build_moves, build_step_arrays
from duetto.runner.step_parts import StepParts, needs_of
from duetto.runner.tiers.mover import TierRoom


class ModelRunner:
    """Runs a program on one backend, over `num_blocks` blocks of KV that it allocates at once."""

    def __init__(
        self,
        program: Program,
        backend: Backend,
        num_blocks: int,
        block_size: int,
        kv_dtype: KVDtype,
        proposers: Mapping[str, Proposer] | None = None,
        depth: int = 0,
        tiers: TierRoom | None = None,
        masks: Masks | None = None,
    ) -> None:
        """`proposers` of drafts, by the method that `ScheduledRequest.drafting` names; `depth` is
        the engine's: how many steps may be in flight while the next one is submitted; `tiers` is
        where blocks go that leave the arena; `masks` are those of grammars."""
        assert num_blocks * block_size <= MAX_SLOTS
        self._width = program.logits.width  # the vocabulary, or numbers of a hidden state
        self._backend = backend
        self._block_size = block_size
        self._kv = backend.allocate_kv(num_blocks, block_size, kv_dtype)
        self._parts = StepParts(backend, self._kv, program.logits.width, proposers, tiers, masks)
        self.depth = depth
        self._last_steps = LastSteps(depth)

    @property
    def backend(self) -> Backend:
        """What computes, for those who measure."""
        return self._backend

    @property
    def block_rows(self) -> Sequence[Sequence[Bytes]]:
        """Where the KV of each layer's blocks lies, for links to other engines."""
        return self._backend.block_rows(self._kv)

    def submit(self, batch: ScheduledBatch) -> Done:
        """Compute one step, at once.

        The result of a request whose own logits or masks leave no token is an error; the others are
        not touched by it. Anything else that goes wrong raises, and concerns the whole step.
        """
        parts = self._parts
        moving_s = parts.move(batch)
        if not batch.requests:
            return Done(StepOutput((), 0.0, moving_s, parts.moved(batch.awaits)))
        needs = needs_of(batch)
        if needs.moves:
            self._backend.move_kv(build_moves(batch, self._block_size), self._kv)
        if needs.placeholders:
            batch = self._last_steps.resolved(batch)
        masks = parts.start_masks(batch, needs)
        results = self._look(batch, masks) if needs.looks else self._run(batch, masks)
        if self.depth:
            self._last_steps.keep(batch, results)
        output = parts.output(batch, results, needs)
        return Done(output._replace(moving_s=moving_s, moved=parts.moved()))

    def _run(self, batch: ScheduledBatch, masks: Future[Constrained] | None) -> list[RequestResult]:
        step, logit_starts = build_step_arrays(batch, self._block_size)
        logits = self._backend.run(step, self._kv)
        return self._results(batch, logits, logit_starts, masks)

    def _look(
        self, batch: ScheduledBatch, masks: Future[Constrained] | None
    ) -> list[RequestResult]:
        def results(
            others: ScheduledBatch, logits: FloatArray, logit_starts: tuple[int, ...]
        ) -> list[RequestResult]:
            return self._results(others, logits, logit_starts, masks)

        return look(batch, self._backend, self._kv, self._block_size, results)

    def _results(
        self,
        batch: ScheduledBatch,
        logits: FloatArray,
        logit_starts: tuple[int, ...],
        masks: Future[Constrained] | None,
    ) -> list[RequestResult]:
        assert logits.shape == (logit_starts[-1], self._width)
        assert logits.dtype == np.float32
        constrained: Constrained = {} if masks is None else masks.result()
        return results_of(batch, logits, logit_starts, constrained)
