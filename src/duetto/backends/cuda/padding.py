"""Rows that fill a recorded step up to its size: they compute, and nobody reads what."""

import numpy as np

from duetto.backends.backend import StepArrays
from duetto.backends.cuda.arena import CudaArena
from duetto.backends.device import SampleArrays


def padding_step(size: int, kv: CudaArena) -> StepArrays:
    """Rows of padding: each writes to the scratch block, and sees itself."""
    zeros, rows = np.zeros(size, np.int32), np.arange(size + 1, dtype=np.int32)
    slots = zeros + kv.num_blocks * kv.block_size
    tables = np.full((size, 1), kv.num_blocks, np.int32)
    return StepArrays(zeros, zeros, slots, rows, zeros + 1, tables, rows[:size])


def padding_prompt(size: int, kv: CudaArena) -> StepArrays:
    """One run of padding, whose last row is wanted."""
    zeros, scratch = np.zeros(size, np.int32), kv.num_blocks
    slots = zeros + scratch * kv.block_size
    tables = np.full((1, -(-size // kv.block_size)), scratch, np.int32)
    ends, last = np.array([0, size], np.int32), np.array([size - 1], np.int32)
    return StepArrays(zeros, zeros, slots, ends, ends[1:], tables, last)


def padded_step(step: StepArrays, size: int, kv: CudaArena) -> StepArrays:
    """With rows of padding behind it."""
    count, width = step.block_tables.shape
    if count == size:
        return step
    more = padding_step(size - count, kv)
    tables = np.full((size, width), kv.num_blocks, np.int32)
    tables[:count] = step.block_tables
    ends = np.arange(size + 1, dtype=np.int32)
    return StepArrays(
        np.concatenate((step.token_ids, more.token_ids)),
        np.concatenate((step.positions, more.positions)),
        np.concatenate((step.slots, more.slots)),
        ends,
        np.concatenate((step.context_lens, more.context_lens)),
        tables,
        ends[:size],
    )


def greedy_samples(size: int) -> SampleArrays:
    zeros = np.zeros(size)
    keys, top_ks = np.zeros(size, np.uint64), np.zeros(size, np.int32)
    return SampleArrays(zeros, keys, top_ks, zeros + 1, zeros - np.inf)


def padded_samples(sampling: SampleArrays, size: int) -> SampleArrays:
    """With rows of padding behind them."""
    more = greedy_samples(size - len(sampling.keys))
    return SampleArrays(
        np.concatenate((sampling.temperatures, more.temperatures)),
        np.concatenate((sampling.keys, more.keys)),
        np.concatenate((sampling.top_ks, more.top_ks)),
        np.concatenate((sampling.top_ps, more.top_ps)),
        np.concatenate((sampling.min_gaps, more.min_gaps)),
    )
