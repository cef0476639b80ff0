"""Gumbel-max: the token with the largest logit / temperature + noise(seed, position, token id).

The largest of log p + Gumbel noise is a draw from p (Gumbel, 1954). The noise is a hash of three
numbers, so a draw depends neither on the order nor on the number of candidates, and two close
distributions under the same noise mostly give the same token (Daliri, Musco and Suresh, 2024).

    key    = Philox4x64-10 (Salmon et al., SC 2011) of (seed, position): 64 bits, once per row
    hash   = two rounds of lowbias32 (Wellons, 2018) of the token id, each under half of the key
    u      = (hash + 1/2) / 2^32, exact, never 0 or 1
    noise  = -ln(-ln(u)), between -3.14 and 22.88
    score  = (logit - largest logit) / temperature + noise; among equals the lowest id wins

Scores are doubles, and each operation is rounded once, `_ln` included: csrc/sampler.cpp does the
same operations in the same order, and both give the same token always. Neither scores every token:
`-ln(1 - u)` is an upper bound of the noise, so close that one or two tokens remain.
"""

import numpy as np
from numpy.typing import NDArray

from duetto.backends.cpu.native import native

Ids = NDArray[np.intp]
Doubles = NDArray[np.float64]

HAS_NATIVE = hasattr(native, "draw_filtered")  # an older module has none

_ROOT_OF_HALF = 0x3FE6A09E667F3BCD  # the bits of a double
_LN_2 = 0.6931471805599453
_SLACK = 1e-9  # of a bound: far more than roundings, far less than what lies between two tokens


def key_of(seed: int, position: int) -> int:
    """64 bits from which the noise of the output token at `position` is made.

    Of these two alone, so a preempted, batched or resumed request goes on with the same stream.
    """
    if HAS_NATIVE:  # numpy counts up before it draws
        return native.philox(position + 1, seed % 2**64, seed // 2**64 % 2**64)
    return key_in_numpy(seed, position)


def key_in_numpy(seed: int, position: int) -> int:
    """The slow twin of the native key."""
    return int(np.random.Philox(key=seed % 2**128, counter=position).random_raw())


def hashes(key: int, ids: Ids) -> NDArray[np.uint32]:
    """One per token id [n]; a bijection of the ids for one key."""
    x = ids.astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x = _lowbias32(x) ^ np.uint32(key >> 32)
    return _lowbias32(x)


def noise(key: int, ids: Ids) -> Doubles:
    """Gumbel noise [n] of the token ids."""
    return _noise_of(hashes(key, ids))


def draw(scaled: Doubles, ids: Ids | None, key: int) -> int:
    """The token with the largest score.

    `scaled` [n] is (logit - largest) / temperature, so 0 at least once, of the tokens `ids` [n],
    ascending; None: 0, 1, ...
    """
    if HAS_NATIVE:
        return native.draw_scaled(scaled, ids, key)
    return draw_in_numpy(scaled, ids, key)


def draw_in_numpy(scaled: Doubles, ids: Ids | None, key: int) -> int:
    """The slow twin of the native draw."""
    ids = np.arange(len(scaled)) if ids is None else ids
    x = hashes(key, ids)
    bounds = scaled - np.log(_middle(~x))
    likely = int(bounds.argmax())
    best = float(scaled[likely] + _noise_of(x[likely : likely + 1])[0])
    near = np.flatnonzero(bounds >= best - _SLACK)
    return int(ids[near[(scaled[near] + _noise_of(x[near])).argmax()]])


def _noise_of(x: NDArray[np.uint32]) -> Doubles:
    return -_ln(-_ln(_middle(x)))


def _middle(x: NDArray[np.uint32]) -> Doubles:
    """In (0, 1), exactly: the middle of the x-th of 2^32 equal parts."""
    return (x.astype(np.float64) + 0.5) * 2.0**-32


def _lowbias32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _ln(numbers: Doubles) -> Doubles:
    """Natural logarithm of normal numbers > 0, from operations that are rounded exactly: 2 atanh of
    (m - 1) / (m + 1), with m in [0.7, 1.42). Right to a few units in the last place."""
    bits = numbers.view(np.int64) - _ROOT_OF_HALF
    exponent = (bits >> 52).astype(np.float64)
    m = ((bits & 0xFFFFFFFFFFFFF) + _ROOT_OF_HALF).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p: Doubles | float = 1.0 / 21
    for odd in range(19, 0, -2):
        p = p * z + 1.0 / odd
    return exponent * _LN_2 + (2.0 * s) * p
