"""The real Executor: a scheduled batch to arrays, to a backend's logits, to tokens.

Keeps nothing about a request: what a step needs comes with its batch, and what outlives a step is
KV in blocks, and what the last steps sampled. Knows no schedule, no text and no architecture.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from duetto.backends.backend import Backend, FloatArray, StepArrays
from duetto.core.batch import (
    PLACEHOLDER,
    RequestResult,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
    TokenLogprob,
)
from duetto.core.errors import EngineError
from duetto.core.executor import Done
from duetto.program.dtype import KVDtype
from duetto.program.kv_size import MAX_SLOTS
from duetto.program.program import Program
from duetto.runner.looks import look_at_deviations, looks_at_deviation, with_scores_of_looks
from duetto.runner.masks import Constrained, ConstrainedRows, Masks
from duetto.runner.placeholders import LastSteps
from duetto.runner.pooling import pooled
from duetto.runner.proposers.drafters import Drafters
from duetto.runner.proposers.proposer import Proposer
from duetto.runner.sampler import token_logprob
from duetto.runner.step_arrays import build_looks, build_moves, build_step_arrays
from duetto.runner.tiers.mover import Mover, TierRoom
from duetto.runner.verify import verify


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
        self._mover = None if tiers is None else Mover(backend, self._kv, tiers)
        self._drafters = Drafters(proposers or {}, program.logits.width)
        self._masks = masks
        self._depth = depth
        self._last_steps = LastSteps(depth)

    @property
    def backend(self) -> Backend:
        """What computes, for those who measure."""
        return self._backend

    def submit(self, batch: ScheduledBatch) -> Done:
        """Compute one step, at once.

        The result of a request whose own logits or masks leave no token is an error; the others are
        not touched by it. Anything else that goes wrong raises, and concerns the whole step.
        """
        moving_s = 0.0
        if self._mover is not None:
            moving_s = self._mover.move(batch)
            if not batch.requests:
                return Done(StepOutput((), 0.0, moving_s, self._mover.results(batch.awaits)))
        is_drafting = has_placeholders = has_moves = has_looks = has_grammars = False
        for request in batch.requests:
            is_drafting = is_drafting or request.drafting is not None
            has_placeholders = has_placeholders or request.token_ids[-1] == PLACEHOLDER
            has_moves = has_moves or bool(request.moves)
            has_looks = has_looks or request.look is not None
            if request.rows:
                has_grammars = has_grammars or request.rows[0].grammar is not None
        if has_moves:
            self._backend.move_kv(build_moves(batch, self._block_size), self._kv)
        if has_placeholders:
            batch = self._last_steps.resolved(batch)
        masks = None
        if has_grammars:
            masks = self._start_masks(batch.requests)
        elif self._masks is not None and self._masks.keeps_some:
            self._start_masks(())
        results = self._look(batch, masks) if has_looks else self._run(batch, masks)
        if self._depth:
            self._last_steps.keep(batch, results)
        mask_s = 0.0
        if has_grammars and self._masks is not None:
            results = self._masks.with_drafts(batch.requests, results)
            mask_s = self._masks.mask_s
        drafting_s = 0.0
        if is_drafting:
            results, drafting_s = self._drafters.propose(batch.requests, results)
        moved = () if self._mover is None else self._mover.results(())
        return Done(StepOutput(tuple(results), drafting_s, moving_s, moved, mask_s))

    def _start_masks(self, requests: Sequence[ScheduledRequest]) -> Future[Constrained]:
        assert self._masks is not None, "a grammar, and nothing that could follow it"
        return self._masks.start(requests)

    def _run(self, batch: ScheduledBatch, masks: Future[Constrained] | None) -> list[RequestResult]:
        step, logit_starts = build_step_arrays(batch, self._block_size)
        logits = self._backend.run(step, self._kv)
        return self._results(batch, step, logits, logit_starts, masks)

    def _look(
        self, batch: ScheduledBatch, masks: Future[Constrained] | None
    ) -> list[RequestResult]:
        """As _run, where some requests look. Those that look at deviations are computed apart from
        the others, which go through all layers."""
        deviating = [r for r in batch.requests if looks_at_deviation(r)]
        others = [r for r in batch.requests if not looks_at_deviation(r)]
        results: list[RequestResult] = []
        if deviating:
            results += look_at_deviations(deviating, self._backend, self._kv, self._block_size)
        if others:
            batch_of_others = ScheduledBatch(tuple(others))
            step, logit_starts = build_step_arrays(batch_of_others, self._block_size)
            looks = build_looks(others)
            logits, scores = self._backend.look_attention(step, self._kv, looks)
            own = self._results(batch_of_others, step, logits, logit_starts, masks)
            results += with_scores_of_looks(others, own, scores)
        ids = [request.request_id for request in deviating + others]
        by_id = dict(zip(ids, results, strict=True))
        return [by_id[request.request_id] for request in batch.requests]

    def _results(
        self,
        batch: ScheduledBatch,
        step: StepArrays,
        logits: FloatArray,
        logit_starts: tuple[int, ...],
        masks: Future[Constrained] | None,
    ) -> list[RequestResult]:
        assert logits.shape == (len(step.logit_rows), self._width)
        assert logits.dtype == np.float32
        constrained: Constrained = {} if masks is None else masks.result()
        return [
            _result(request, logits, start, constrained.get(request.request_id))
            for request, start in zip(batch.requests, logit_starts[:-1], strict=True)
        ]


def _result(
    request: ScheduledRequest,
    logits: FloatArray,
    start: int,
    constrained: ConstrainedRows | None = None,
) -> RequestResult:
    """What its rows of logits, from `start` on, give one request: those that score its prompt come
    first. Of a program without its head the row is a hidden state."""
    if request.pooling is not None:
        return pooled(request.pooling, logits[start])
    rows = None
    if constrained is not None:
        if constrained.error is not None:
            return RequestResult(error=constrained.error)
        rows = constrained.rows
    try:
        if not request.prompt_logprob_targets:
            return RequestResult(verify(request, logits, start, rows) if request.rows else ())
        scores = _score_prompt(request, logits[start:])
        tokens = verify(request, logits, start + len(scores), rows) if request.rows else ()
        return RequestResult(tokens, scores=scores)
    except EngineError as error:
        return RequestResult(error=str(error))


def _score_prompt(request: ScheduledRequest, rows: FloatArray) -> tuple[TokenLogprob, ...]:
    """How likely the model found the prompt's own next tokens: row i predicts token i + 1."""
    targets = request.prompt_logprob_targets
    return tuple(
        token_logprob(row, target, request.num_prompt_logprobs)
        for row, target in zip(rows[: len(targets)], targets, strict=True)
    )
