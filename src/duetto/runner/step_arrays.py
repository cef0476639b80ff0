"""A scheduled batch as the arrays a backend takes. Knows nothing of models, logits or sampling.

A plain loop: most steps have one token per request, and a numpy call on so little costs more than
the request's whole share of the loop. The scheduler's promises are asserted here, where a broken
one would otherwise become a write into another request's KV.
"""

from collections.abc import Sequence
from itertools import chain
from operator import lt

import numpy as np

from duetto.backends.backend import AttentionLook, IntArray, KVMoves, StepArrays
from duetto.core.batch import Look, ScheduledBatch, ScheduledRequest


def build_step_arrays(batch: ScheduledBatch, block_size: int) -> tuple[StepArrays, tuple[int, ...]]:
    """The step's arrays, and where each request's logits lie.

    A request whose positions have gaps is several runs of positions over one block table: to a
    kernel each of them is a chunk.

    The second, `logit_starts` [requests + 1], cuts the rows of logits that the backend returns:
    request r owns rows logit_starts[r] ... logit_starts[r + 1]. First come the rows that score its
    prompt, one for each of `prompt_logprob_targets`; then those that are sampled, its last ones, or
    the last one, if it is to be pooled.
    """
    requests = batch.requests
    assert requests, "an empty batch"
    assert len({r.request_id for r in requests}) == len(requests), "a request twice"
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    context_lens: list[int] = []
    tables: list[tuple[int, ...]] = []
    query_starts, logit_starts, logit_rows = [0], [0], list[int]()
    for request in requests:
        _check(request, block_size)
        table = request.block_table
        token_ids += request.token_ids
        first_row = query_starts[-1]
        for start, end in request.runs:
            positions += range(start, end)
            slots += _slots(table, range(start, end), block_size)
            context_lens.append(end)
            query_starts.append(query_starts[-1] + end - start)
            tables.append(table)
        logit_rows += range(first_row, first_row + len(request.prompt_logprob_targets))
        logit_rows += range(query_starts[-1] - request.num_wanted_rows, query_starts[-1])
        logit_starts.append(len(logit_rows))
    assert len(set(slots)) == len(slots), "two tokens would be written into one slot"
    a = _arrays((token_ids, positions, slots, query_starts, context_lens, logit_rows))
    step = StepArrays(a[0], a[1], a[2], a[3], a[4], _block_tables(tables), a[5])
    return step, tuple(logit_starts)


def build_moves(batch: ScheduledBatch, block_size: int) -> KVMoves:
    """All that the step brings elsewhere before it computes."""
    columns: tuple[list[int], ...] = [], [], [], []
    for request in batch.requests:
        for blocks, start, end, position in request.moves:
            there = range(position, position + end - start)
            columns[0].extend(_slots(blocks, range(start, end), block_size))
            columns[1].extend(_slots(request.block_table, there, block_size))
            columns[2].extend(range(start, end))
            columns[3].extend(there)
    return KVMoves(*_arrays(columns))


def build_looks(requests: Sequence[ScheduledRequest]) -> list[AttentionLook]:
    """Of the requests of a step that look at attention, which runs are theirs, and at what."""
    looks, first = [], 0
    for request in requests:
        last = first + len(request.runs)
        if request.look is not None:
            places = [np.arange(start, end, dtype=np.int32) for start, end in request.look.ranges]
            looks.append(AttentionLook(first, last, np.concatenate(places)))
        first = last
    return looks


def _slots(table: Sequence[int], positions: range, block_size: int) -> list[int]:
    return [table[p // block_size] * block_size + p % block_size for p in positions]


def _arrays(lists: Sequence[list[int]]) -> list[IntArray]:
    """Each list as an array; all are parts of one, as making an array costs more than a part."""
    whole = np.array(list(chain.from_iterable(lists)), np.int32)
    arrays, start = [], 0
    for each in lists:
        end = start + len(each)
        arrays.append(whole[start:end])
        start = end
    return arrays


def _check(request: ScheduledRequest, block_size: int) -> None:
    """Assert what the scheduler promises of one request."""
    length = len(request.token_ids)
    assert length >= 1 and request.num_computed_tokens >= 0, "nothing to compute"
    assert request.end <= len(request.block_table) * block_size, "a block table is too short"
    # The last of a prompt's tokens has no target, so no row is both scored and sampled.
    assert not (request.rows and request.pooling), "sampled and pooled"
    num_rows = len(request.prompt_logprob_targets) + request.num_wanted_rows
    assert num_rows <= length, "more logit rows than tokens"
    if request.look is not None:
        _check_look(request, request.look, len(request.block_table) * block_size)
    if request.positions is None:
        return
    assert len(request.positions) == length, "not one position for each token"
    assert request.positions[0] == request.num_computed_tokens, "the first position is another one"
    assert all(map(lt, request.positions, request.positions[1:])), "positions do not ascend"
    assert not request.prompt_logprob_targets, "a prompt with gaps cannot be scored"


def _check_look(request: ScheduledRequest, look: Look, num_slots: int) -> None:
    if look.method == "deviation":
        has_rows = request.rows or request.prompt_logprob_targets
        assert not has_rows, "who looks at deviations has no logits"
        assert not look.ranges, "a look at deviations is of the step's own tokens"
        return
    assert look.method == "attention", "a look of an unknown kind"
    assert look.ranges, "a look at nothing"
    last = 0
    for start, end in look.ranges:
        assert last <= start < end, "the ranges of a look do not ascend"
        last = end
    assert last <= num_slots, "a look beyond its blocks"


def _block_tables(tables: Sequence[tuple[int, ...]]) -> IntArray:
    """[runs, most blocks of any], padded with 0."""
    if len(tables) > 1:
        most = max(map(len, tables))
        tables = [table + (0,) * (most - len(table)) for table in tables]
    return np.array(tables, np.int32)
