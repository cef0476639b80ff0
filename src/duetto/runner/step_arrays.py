"""A scheduled batch as the arrays a backend takes. Knows nothing of models, logits or sampling.

The scheduler's promises are asserted here, where a broken one would otherwise become a write into
another request's KV.
"""

from collections.abc import Iterable
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import IntArray, StepArrays
from duetto.core.batch import ScheduledBatch


def build_step_arrays(batch: ScheduledBatch, block_size: int) -> tuple[StepArrays, IntArray]:
    """The step's arrays, and where each request's logits lie.

    The second array, `logit_starts` [R + 1], cuts the rows of logits that the backend returns:
    request r owns rows logit_starts[r] ... logit_starts[r + 1]. First come the rows that score its
    prompt, one for each of `prompt_logprob_targets`; then, if it is to be sampled, one more.
    """
    requests = batch.requests
    assert requests, "an empty batch"
    assert len({r.request_id for r in requests}) == len(requests), "a request twice"
    lengths = _ints((len(r.token_ids) for r in requests), len(requests))
    num_computed = _ints((r.num_computed_tokens for r in requests), len(requests))
    num_targets = _ints((len(r.prompt_logprob_targets) for r in requests), len(requests))
    is_sampled = np.array([r.sampling is not None for r in requests])
    assert lengths.min() >= 1 and num_computed.min() >= 0, "nothing to compute"
    held = _ints((len(r.block_table) for r in requests), len(requests)) * block_size
    assert (num_computed + lengths <= held).all(), "a block table is too short"
    # The last of a prompt's tokens has no target, so no row is both scored and sampled.
    assert (num_targets + is_sampled <= lengths).all(), "more logit rows than tokens"

    starts = _starts(lengths)
    owner = np.repeat(np.arange(len(requests), dtype=np.int32), lengths)  # [T]
    place = np.arange(starts[-1], dtype=np.int32) - starts[owner]  # [T], within its own chunk
    positions = num_computed[owner] + place
    block_tables = _block_tables(batch)
    step = StepArrays(
        token_ids=_ints(chain.from_iterable(r.token_ids for r in requests), int(starts[-1])),
        positions=positions,
        slots=_slots(block_tables, owner, positions, block_size),
        query_starts=starts,
        context_lens=num_computed + lengths,
        block_tables=block_tables,
        logit_rows=_logit_rows(starts, owner, place, num_targets, is_sampled),
    )
    return step, _starts(num_targets + is_sampled.astype(np.int32))


def _ints(values: Iterable[int], count: int) -> IntArray:
    return np.fromiter(values, dtype=np.int32, count=count)


def _starts(lengths: IntArray) -> IntArray:
    """[n] lengths of runs -> [n + 1]: where each run starts, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _block_tables(batch: ScheduledBatch) -> IntArray:
    """[R, most blocks of any], padded with 0."""
    most = max(len(r.block_table) for r in batch.requests)
    tables = np.zeros((len(batch.requests), most), dtype=np.int32)
    for row, request in zip(tables, batch.requests, strict=True):
        row[: len(request.block_table)] = request.block_table
    assert tables.min(initial=0) >= 0
    return tables


def _slots(
    block_tables: IntArray, owner: IntArray, positions: IntArray, block_size: int
) -> IntArray:
    """[T]: the slot of each token's KV. No two tokens of a step share one."""
    blocks = block_tables[owner, positions // block_size]
    slots: IntArray = blocks * np.int32(block_size) + positions % np.int32(block_size)
    assert len(np.unique(slots)) == len(slots), "two tokens would be written into one slot"
    return slots


def _logit_rows(
    starts: IntArray,
    owner: IntArray,
    place: IntArray,
    num_targets: IntArray,
    is_sampled: NDArray[np.bool_],
) -> IntArray:
    """Rows whose logits are wanted: each request's scored rows, and its last if it is sampled."""
    wanted = place < num_targets[owner]
    wanted[starts[1:][is_sampled] - 1] = True
    return np.flatnonzero(wanted).astype(np.int32)
