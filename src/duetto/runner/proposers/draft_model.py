"""Drafts are what a smaller model with the same tokenizer would say.

It has a KV arena of its own under the target's block tables, so a prefix that the target has cached
is, where the draft has computed it, cached for both. Its tokens are drawn with the request's own
random stream, as the target's will be; so at any temperature they agree nearly as often as two
such distributions can (Daliri, Musco and Suresh, 2024).

Knows no schedule. What it computes for a request beyond the blocks of the target goes into scratch
blocks of its own.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from duetto.backends.backend import Backend, FloatArray
from duetto.core.batch import ScheduledBatch, ScheduledRequest
from duetto.core.errors import EngineError
from duetto.program.dtype import KVDtype
from duetto.program.program import Program
from duetto.runner.proposers.draft_kv import Chain, DraftKV
from duetto.runner.proposers.drafters import advanced
from duetto.runner.proposers.histories import Histories
from duetto.runner.proposers.proposer import DraftRequest
from duetto.runner.sampler import sample_token
from duetto.runner.step_arrays import build_step_arrays

MAX_TOKENS = 512  # of prompts and answers, caught up with in one call: other streams are waiting
_MAX_REMEMBERED = 2**22  # tokens, of all requests


class _Work:
    """One request within a call. `token_ids` grows by its drafts."""

    __slots__ = (
        "chain",
        "drafts",
        "limit",
        "num_known",
        "num_valid",
        "request_id",
        "sampling",
        "table",
        "token_ids",
        "waits",
        "wanted",
    )

    def __init__(self, request: DraftRequest, token_ids: list[int], chain: Chain) -> None:
        self.request_id, self.sampling = request.request_id, request.sampling
        self.wanted = request.num_wanted if request.sampling is not None else 0
        self.token_ids, self.chain, self.num_known = token_ids, chain, len(token_ids)
        self.table = list(request.block_table)
        self.limit = self.num_valid = 0
        self.waits = False  # for KV that another one computes in this round
        self.drafts: list[int] = []

    @property
    def is_done(self) -> bool:
        return bool(self.drafts) and len(self.drafts) >= self.wanted


class DraftModelProposer:
    needs_hidden = False

    def __init__(
        self,
        program: Program,
        backend: Backend,
        *,
        vocab_size: int,
        num_blocks: int,
        num_scratch_blocks: int,
        block_size: int,
        kv_dtype: KVDtype,
        max_requests: int,
        max_model_len: int,
    ) -> None:
        """`vocab_size`, `num_blocks` and `block_size` are the target's. Raises MemoryError where
        the arena, of both kinds of blocks, is not to be had."""
        self._backend, self._program = backend, program
        self._vocab_size, self._block_size = vocab_size, block_size
        self._max_model_len = max_model_len
        self._scratch = range(num_blocks, num_blocks + num_scratch_blocks)
        self._kv = backend.allocate_kv(num_blocks + num_scratch_blocks, block_size, kv_dtype)
        self._valid = DraftKV(block_size)
        self._histories = Histories[Chain](Chain, max_requests, _MAX_REMEMBERED)
        self.num_computed_tokens = 0  # ever, to be watched

    def propose(self, requests: Sequence[DraftRequest]) -> list[tuple[int, ...]]:
        works = [self._begin(request) for request in requests]
        self._give_scratch([w for w in works if w is not None and w.wanted])
        todo = sorted([w for w in works if w is not None], key=_urgency)
        left = MAX_TOKENS
        try:
            while parts := self._parts(todo, left):
                self._compute(parts)
                left -= sum(end - start for _, start, end in parts if end - start > 1)
        finally:
            for work in todo:  # the history keeps what is known, no guesses
                del work.token_ids[work.num_known :]
                work.chain.cut(work.num_known, self._block_size)
        return [tuple(w.drafts) if w is not None else () for w in works]

    def _begin(self, request: DraftRequest) -> _Work | None:
        history = self._histories.update(request)
        if history is None:
            return None
        chain, token_ids = history.state, history.token_ids
        chain.highest = max([chain.highest, *token_ids[chain.num_read :]])
        chain.num_read = len(token_ids)
        if chain.highest >= self._program.vocab_size:
            return None
        self._valid.extend_keys(chain.keys, token_ids)
        work = _Work(request, token_ids, chain)
        self._limit(work)
        self._look(work)
        return work

    def _limit(self, work: _Work) -> None:
        work.limit = min(len(work.table) * self._block_size, self._max_model_len)

    def _look(self, work: _Work) -> None:
        work.num_valid = self._valid.num_valid(work.table, work.chain, work.token_ids)
        if work.wanted and not work.drafts:  # the last token gives the first draft: once more
            work.num_valid = min(work.num_valid, work.num_known - 1)

    def _give_scratch(self, works: list[_Work]) -> None:
        free = list(self._scratch)
        for work in works:
            end = work.num_known + work.wanted - 1  # the last draft is not computed
            missing = max(0, -(-end // self._block_size) - len(work.table))
            if missing <= len(free):
                work.table += free[:missing]
                del free[:missing]
                self._limit(work)

    def _parts(self, works: list[_Work], left: int) -> list[tuple[_Work, int, int]]:
        """What each computes next: [start, end) of its tokens. No block is written by two: who
        comes second finds the KV there in the next round."""
        parts, claimed = [], set[int]()
        for work in works:
            if work.is_done:
                continue
            if work.waits:
                self._look(work)
            start = work.num_valid
            end = min(len(work.token_ids), work.limit)
            if end - start > 1:
                end = min(end, start + left)
            if end <= start:
                continue
            first = start // self._block_size
            numbers = work.table[first : -(-end // self._block_size)]
            shared = next((i for i, number in enumerate(numbers) if number in claimed), None)
            work.waits = shared is not None
            if shared is not None:
                end = (first + shared) * self._block_size
            if end > start:
                claimed.update(numbers[:shared])
                left -= end - start if end - start > 1 else 0
                parts.append((work, start, end))
        return parts

    def _compute(self, parts: list[tuple[_Work, int, int]]) -> None:
        batch = ScheduledBatch(tuple([self._scheduled(*part) for part in parts]))
        step, logit_starts = build_step_arrays(batch, self._block_size)
        try:
            logits = self._backend.run(step, self._kv)
        except BaseException:
            for work, start, _ in parts:
                self._valid.forget(work.table[start // self._block_size :])
            raise
        self.num_computed_tokens += batch.num_tokens
        for place, (work, start, end) in enumerate(parts):
            self._valid.write(work.table, work.chain, work.token_ids, start, end)
            work.num_valid = end
            if logit_starts[place] < logit_starts[place + 1]:
                self._draw(work, logits[logit_starts[place]])

    def _scheduled(self, work: _Work, start: int, end: int) -> ScheduledRequest:
        gives_draft = work.wanted and end == len(work.token_ids)
        return ScheduledRequest(
            request_id=work.request_id,
            token_ids=tuple(work.token_ids[start:end]),
            num_computed_tokens=start,
            block_table=tuple(work.table),
            rows=(work.sampling,) if gives_draft and work.sampling is not None else (),
        )

    def _draw(self, work: _Work, row: FloatArray) -> None:
        sampling = work.sampling
        assert sampling is not None
        if sampling.params.logprobs is not None:
            sampling = sampling._replace(params=replace(sampling.params, logprobs=None))
        try:
            token_id = sample_token(self._in_target_vocabulary(row), sampling).token_id
        except EngineError:  # the request's masks, or the draft's logits: no more drafts
            work.wanted = len(work.drafts)
            work.limit = 0
            return
        work.drafts.append(token_id)
        work.token_ids.append(token_id)
        self._valid.extend_keys(work.chain.keys, work.token_ids)
        work.sampling = advanced(sampling, token_id)

    def _in_target_vocabulary(self, row: FloatArray) -> FloatArray:
        """Rows may differ in padding. What the target has no id for is not drafted."""
        if len(row) == self._vocab_size:
            return row
        fitted = np.full(self._vocab_size, -np.inf, np.float32)
        count = min(len(row), self._vocab_size)
        fitted[:count] = row[:count]
        return fitted


def _urgency(work: _Work) -> tuple[bool, int]:
    """Who wants drafts comes first, and of those who has least to catch up with."""
    return not work.wanted, len(work.token_ids) - work.num_valid
