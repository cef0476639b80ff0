"""Looks: what of them is the same in every backend."""

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray, ScoreArray

_ROWS = 128  # at a time, so that what is made on the way takes little memory

KeysAndValues = tuple[FloatArray, FloatArray]  # [N, kv_heads, head_dim] each


def deviations(before: KeysAndValues, after: KeysAndValues) -> ScoreArray:
    """[N]: the squared differences of each token's keys and values, over all heads.

    Differences and squares in fp32, summed in double: row by row, so that company changes nothing.
    """
    scores = np.empty(len(after[0]))
    for start in range(0, len(scores), _ROWS):
        rows = slice(start, start + _ROWS)
        squares = [_squares(old[rows], new[rows]) for old, new in zip(before, after, strict=True)]
        scores[rows] = np.concatenate(squares, axis=1).sum(axis=1)
    return scores


def _squares(before: FloatArray, after: FloatArray) -> ScoreArray:
    difference = (after - before).reshape(len(after), -1)
    return (difference * difference).astype(np.float64)


def attention_scores(units: NDArray[np.int64], num_lost: int) -> ScoreArray:
    """Sums of whole units as scores. If weights of any token were no numbers, no score is one."""
    scores = units.astype(np.float64)
    if num_lost:
        scores.fill(np.nan)
    return scores
