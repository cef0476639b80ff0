"""Which tokens may be drawn: top_k, min_p and top_p over one row of logits, in numpy.

Tokens are ranked by logit, equal ones by id, lower first. Each of the three keeps the first of this
order, so the order of top_k and min_p does not matter; top_p is of what these two leave.

A sum of weights decides what top_p keeps. csrc/sampler.cpp sums in another order, and must find the
same tokens. So a weight is a whole number, and sums are exact. This is the slow twin, and what runs
where there is no native module. Knows no random numbers.
"""

import math
import sys

import numpy as np
from numpy.typing import NDArray

from duetto.core.sampling_params import SamplingParams
from duetto.runner.gumbel import Doubles, Ids

Row = NDArray[np.float32] | NDArray[np.float64]  # [vocabulary]

_BLOCK = 128  # logits whose largest is looked at first
_AT_A_TIME = 4096  # numbers that stay in the cache through twenty operations
_LEAST_GAP = -64.0  # and less weighs 0, as does all below -28.5
_EXP_TERMS = [1.0 / math.factorial(n) for n in range(10, -1, -1)]
_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453


def candidates(logits: Row, params: SamplingParams) -> tuple[Doubles, Ids | None]:
    """(logit - largest) / temperature of the tokens that may be drawn, and their ids, ascending;
    None: all. The largest logit is finite, the temperature above 0."""
    ids: Ids | None = None
    if 0 < params.top_k < len(logits):
        ids = set_of_largest(logits, params.top_k)
        logits = logits[ids]
    logits = logits.astype(np.float64)
    first = float(logits.max())
    with np.errstate(over="ignore", under="ignore"):  # to -inf and 0, as a cold draw should
        kept = np.flatnonzero(logits >= lowest(first, params)) if params.min_p > 0.0 else None
        if params.top_p < 1.0:
            left = logits if kept is None else logits[kept]
            inner = nucleus(left, params.temperature, params.top_p)
            kept = inner if kept is None else kept[inner]
        scaled = ((logits if kept is None else logits[kept]) - first) / params.temperature
    if kept is None:
        return scaled, ids
    return scaled, kept if ids is None else ids[kept]


def lowest(first: float, params: SamplingParams) -> float:
    """The least logit that min_p keeps where the largest is `first`; -inf: all."""
    return first + min_gap(params)


def min_gap(params: SamplingParams) -> float:
    """What a logit may be below the largest for min_p to keep it, as a number <= 0; -inf: any."""
    return params.temperature * math.log(params.min_p) if params.min_p > 0.0 else -math.inf


def nucleus(logits: Doubles, temperature: float, top_p: float) -> Ids:
    """The first tokens that hold `top_p` < 1 of all weights (Holtzman et al., 2020), and no more
    than needed; by ascending index."""
    first, inverse = float(logits.max()), min(1.0 / temperature, sys.float_info.max)
    each = weights((logits - first) * inverse)
    total = float(each.sum())
    wanted = top_p * total
    # All that weigh less than this hold, together, half of what may be left out at most. So the
    # nucleus is among the others, and sorting the whole vocabulary would cost most of all.
    least = (total - wanted) / (2 * len(logits))
    likeliest = np.sort(logits[each >= least])[::-1]
    own = weights((likeliest - first) * inverse)
    ahead = np.cumsum(own) - own
    count = int(np.count_nonzero(ahead.astype(np.float64) < wanted))
    return _those_from(logits, float(likeliest[count - 1]), count)


def weights(gaps: Doubles) -> NDArray[np.uint64]:
    """exp(gaps), of gaps <= 0, in whole numbers of 2^-40; csrc/weight.h does the same operations.

    2^n exp(r), with x = n ln 2 + r and exp's series. Each operation is rounded once.
    """
    each = np.empty(len(gaps), np.uint64)
    for start in range(0, len(gaps), _AT_A_TIME):
        x = np.maximum(gaps[start : start + _AT_A_TIME], _LEAST_GAP)
        n = np.rint(x * _LOG2_E)
        r = x - n * _LN_2
        series = np.full_like(r, _EXP_TERMS[0])
        for term in _EXP_TERMS[1:]:
            series *= r
            series += term
        each[start : start + _AT_A_TIME] = np.rint(np.ldexp(series, n.astype(np.int32) + 40))
    return each


def largest(values: Row, count: int) -> Ids:
    """Indices of the `count` largest values, largest first; equal ones by index."""
    if count <= 0:
        return np.arange(0)
    those = np.flatnonzero(values >= _at_least(values, count))
    order = np.argsort(-values[those], kind="stable")
    return those[order[:count]]


def set_of_largest(values: Row, count: int) -> Ids:
    """Indices of the `count` largest values in ascending order; lower ones first among equals.

    The set of `largest` without its order, which is what costs where many are wanted.
    """
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    return _those_from(values, threshold, count)


def _at_least(values: Row, count: int) -> float:
    """A bound that `count` values or more reach, and few others."""
    if count >= len(values):
        return -math.inf
    num_blocks = len(values) // _BLOCK
    if num_blocks < 2 * count:
        return float(np.partition(values, len(values) - count)[len(values) - count])
    # The largest of that many blocks reach it: many times faster than to part all values.
    tops = values[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).max(axis=1)
    return float(np.partition(tops, num_blocks - count)[num_blocks - count])


def _those_from(values: Row, threshold: float, count: int) -> Ids:
    """Indices of the `count` largest values, of which `threshold` is the smallest."""
    kept = values > threshold
    equal = np.flatnonzero(values == threshold)
    kept[equal[: count - int(np.count_nonzero(kept))]] = True
    return np.flatnonzero(kept)
