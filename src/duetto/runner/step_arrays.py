"""A scheduled batch as the arrays a backend takes. Knows nothing of models, logits or sampling.

A plain loop: most steps have one token per request, and a numpy call on so little costs more than
the request's whole share of the loop. The scheduler's promises are asserted here, where a broken
one would otherwise become a write into another request's KV.
"""

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np

from duetto.backends.backend import IntArray, StepArrays
from duetto.core.batch import ScheduledBatch, ScheduledRequest


def build_step_arrays(batch: ScheduledBatch, block_size: int) -> tuple[StepArrays, tuple[int, ...]]:
    """The step's arrays, and where each request's logits lie.

    The second, `logit_starts` [R + 1], cuts the rows of logits that the backend returns: request r
    owns rows logit_starts[r] ... logit_starts[r + 1]. First come the rows that score its prompt,
    one for each of `prompt_logprob_targets`; then those that are sampled, its last ones.
    """
    requests = batch.requests
    assert requests, "an empty batch"
    assert len({r.request_id for r in requests}) == len(requests), "a request twice"
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    context_lens: list[int] = []
    query_starts, logit_starts, logit_rows = [0], [0], list[int]()
    for request in requests:
        start, end = request.num_computed_tokens, _context_len(request, block_size)
        table = request.block_table
        token_ids += request.token_ids
        positions += range(start, end)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
        context_lens.append(end)
        first_row = query_starts[-1]
        query_starts.append(first_row + end - start)
        logit_rows += range(first_row, first_row + len(request.prompt_logprob_targets))
        logit_rows += range(query_starts[-1] - len(request.rows), query_starts[-1])
        logit_starts.append(len(logit_rows))
    assert len(set(slots)) == len(slots), "two tokens would be written into one slot"
    a = _arrays((token_ids, positions, slots, query_starts, context_lens, logit_rows))
    step = StepArrays(a[0], a[1], a[2], a[3], a[4], _block_tables(requests), a[5])
    return step, tuple(logit_starts)


def _arrays(lists: Sequence[list[int]]) -> list[IntArray]:
    """Each list as an array; all are parts of one, as making an array costs more than a part."""
    whole = np.array(list(chain.from_iterable(lists)), np.int32)
    ends = accumulate(map(len, lists))
    return [whole[end - len(each) : end] for each, end in zip(lists, ends, strict=True)]


def _context_len(request: ScheduledRequest, block_size: int) -> int:
    """Tokens with KV after this step. Asserts what the scheduler promises of one request."""
    assert request.positions is None, "no backend computes tokens with gaps between them yet"
    length = len(request.token_ids)
    assert length >= 1 and request.num_computed_tokens >= 0, "nothing to compute"
    end = request.num_computed_tokens + length
    assert end <= len(request.block_table) * block_size, "a block table is too short"
    # The last of a prompt's tokens has no target, so no row is both scored and sampled.
    num_rows = len(request.prompt_logprob_targets) + len(request.rows)
    assert num_rows <= length, "more logit rows than tokens"
    return end


def _block_tables(requests: Sequence[ScheduledRequest]) -> IntArray:
    """[R, most blocks of any], padded with 0."""
    tables = [r.block_table for r in requests]
    if len(tables) > 1:
        most = max(map(len, tables))
        tables = [table + (0,) * (most - len(table)) for table in tables]
    return np.array(tables, np.int32)
