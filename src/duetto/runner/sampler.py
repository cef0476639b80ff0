"""From one row of logits to one token. Knows no batch, no request and no model.

Every function looks at one row, so a request's token and log-probabilities are bit-identical in
any company. A row is fp32; arithmetic on it is in float64, or gives the token that float64 gives.

The order of steps is vLLM's (https://docs.vllm.ai/en/v0.22.1/api/vllm/v1/sample/sampler/):

    1. log-probabilities, if asked for, from the raw logits, before everything below
    2. allowed_token_ids
    3. forbidden tokens: the ends of bad words, and ends of sequence before min_tokens
    4. logit_bias
    5. repetition penalty (prompt and output), then frequency and presence penalty (output)
    6. temperature 0: the largest logit, the lowest id among equals; done
    7. temperature
    8. min_p, top_k, top_p: top_p of what the first two leave
    9. draw: Gumbel-max (runner/gumbel.py)

Where vLLM leaves room, this is what happens here: top_k keeps exactly k tokens, lower ids first
among equals (vLLM keeps all that equal the k-th); a small temperature is taken as it is (vLLM calls
it greedy below 1e-5); a rank counts strictly likelier tokens.
"""

import math
from collections.abc import Iterable
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from duetto.backends.cpu.native import native
from duetto.core.batch import SampledToken, SamplingInput, TokenLogprob
from duetto.core.errors import EngineError
from duetto.core.sampling_params import SamplingParams
from duetto.runner import gumbel
from duetto.runner.gumbel import Ids

Row = NDArray[np.float32] | NDArray[np.float64]  # [vocabulary]

_BLOCK = 128  # tokens whose largest is looked at first
_FIRST_NUCLEUS = 64  # likeliest tokens that top_p looks at before it looks at all
_MOST_SORTED = 4096


def sample_token(row: Row, sampling: SamplingInput) -> SampledToken:
    """Choose the next token from raw logits [vocabulary]; `row` is not changed.

    Raises EngineError, with a message that may be shown, if the logits are not finite or if the
    request's own masks leave nothing to choose from.
    """
    params = sampling.params
    token_id = _finite_argmax(row)
    logits = _adjusted(row, sampling)
    if logits is not row:
        token_id = _argmax_of_allowed(logits)
    if not params.is_greedy:
        token_id = _draw(logits, token_id, sampling)
    if params.logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, _logprob(row, token_id, params.logprobs))


def token_logprob(row: Row, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability and rank of a token under raw logits, and the `num_top` likeliest.

    Equally likely tokens stand in the order of their ids. Raises EngineError as sample_token does.
    """
    _finite_argmax(row)
    return _logprob(row, token_id, num_top)


def _logprob(row: Row, token_id: int, num_top: int) -> TokenLogprob:
    assert 0 <= token_id < len(row)
    shifted = row.astype(np.float64)
    shifted -= float(row.max())
    likeliest = _largest(row, num_top)
    own, tops = float(shifted[token_id]), shifted[likeliest].tolist()
    np.exp(shifted, out=shifted)  # in place: a fresh array of this size costs as much again
    log_total = float(np.log(shifted.sum()))
    return TokenLogprob(
        token_id=token_id,
        logprob=own - log_total,
        rank=1 + int(np.count_nonzero(row > row[token_id])),
        top=tuple((i, at - log_total) for i, at in zip(likeliest.tolist(), tops, strict=True)),
    )


def _finite_argmax(row: Row) -> int:
    """The likeliest token, the first of equals.

    Single tokens may be -inf; NaN, +inf, or -inf everywhere is a failure of the model.
    """
    if _is_native(row):
        token_id = native.finite_argmax(row)
    else:  # argmax stops at the first NaN, so the largest element tells all three
        token_id = int(row.argmax())
    if token_id < 0 or not math.isfinite(row[token_id]):
        raise EngineError("the model's output for this request is not finite")
    return token_id


def _is_native(row: Row) -> TypeGuard[NDArray[np.float32]]:
    return gumbel.HAS_NATIVE and row.dtype == np.float32 and row.flags.c_contiguous


def _argmax_of_allowed(logits: Row) -> int:
    """The largest, the first of equals, where masks may have left nothing."""
    token_id = int(logits.argmax())
    if logits[token_id] == -np.inf:
        raise EngineError(
            "no token is left to sample: allowed_token_ids, bad_words and min_tokens "
            "together forbid the whole vocabulary"
        )
    return token_id


def _adjusted(row: Row, sampling: SamplingInput) -> Row:
    """Steps 2 to 5, on a copy; the row itself if they change nothing."""
    params = sampling.params
    changes = params.allowed_token_ids is not None or params.logit_bias or params.needs_history
    if not changes and not sampling.forbidden_token_ids:
        return row
    logits = row.astype(np.float64)
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, len(row))
        logits[:] = -np.inf
        logits[allowed] = row[allowed]
    logits[_ids(sampling.forbidden_token_ids, len(row))] = -np.inf
    if params.logit_bias:
        logits[_ids(params.logit_bias, len(row))] += np.array([*params.logit_bias.values()])
    if params.needs_history:
        _penalize(logits, sampling)
    return logits


def _penalize(logits: NDArray[np.float64], sampling: SamplingInput) -> None:
    """Repetition penalty as in CTRL (Keskar et al., 2019), over prompt and output, in place.

    Frequency and presence penalty are OpenAI's, over the output alone.
    """
    params, size = sampling.params, len(logits)
    output = np.bincount(_ids(sampling.output_token_ids, size), minlength=size)
    seen = output > 0
    seen[_ids(sampling.prompt_token_ids, size)] = True
    repeated = logits[seen]
    with np.errstate(over="ignore"):  # a penalty just above 0: the largest number, not infinity
        penalized = np.where(
            repeated > 0,
            repeated / params.repetition_penalty,
            repeated * params.repetition_penalty,
        )
    logits[seen] = np.minimum(penalized, np.finfo(np.float64).max)
    logits -= params.frequency_penalty * output + params.presence_penalty * (output > 0)


def _draw(logits: Row, best: int, sampling: SamplingInput) -> int:
    """Steps 7 to 9; `best` is the likeliest token."""
    params = sampling.params
    key = gumbel.key_of(sampling.seed, sampling.num_output_tokens)
    is_plain = params.min_p <= 0.0 and params.top_p >= 1.0
    if is_plain and not 0 < params.top_k < len(logits) and _is_native(logits):
        return native.draw_row(logits, best, params.temperature, key)
    return gumbel.draw(*_candidates(logits, params), key)


def _candidates(logits: Row, params: SamplingParams) -> tuple[NDArray[np.float64], Ids | None]:
    """Steps 7 and 8: (logit - largest) / temperature of the tokens that may be drawn, and
    their ids, ascending; None: all.

    A weight is a probability times a constant, such that the likeliest token weighs 1. min_p and
    top_k each keep some of the likeliest, so their order does not matter; top_k goes first, as it
    leaves little to exponentiate.
    """
    ids: Ids | None = None
    if 0 < params.top_k < len(logits):
        ids = _set_of_largest(logits, params.top_k)
        scaled = logits[ids].astype(np.float64)
    else:
        scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    with np.errstate(over="ignore", under="ignore"):  # to -inf and 0, as a cold draw should
        scaled /= params.temperature
        if params.min_p <= 0.0 and params.top_p >= 1.0:
            return scaled, ids
        weights = np.exp(scaled)
    kept = np.flatnonzero(weights >= params.min_p) if params.min_p > 0.0 else None
    if params.top_p < 1.0:
        inner = _nucleus(weights if kept is None else weights[kept], params.top_p)
        kept = inner if kept is None else kept[inner]
    assert kept is not None
    return scaled[kept], kept if ids is None else ids[kept]


def _nucleus(weights: NDArray[np.float64], top_p: float) -> Ids:
    """The fewest of the largest weights that hold `top_p` of their sum (Holtzman et al., 2020), by
    ascending index."""
    wanted = top_p * float(weights.sum())
    for size in (_FIRST_NUCLEUS, len(weights)):  # sorting the whole vocabulary costs most of all
        largest = weights[weights >= _at_least(weights, size)]
        if len(largest) > _MOST_SORTED:
            return _wide_nucleus(weights, wanted)
        largest.sort()
        enough = np.cumsum(largest[::-1]) >= wanted
        if enough.any():
            count = int(enough.argmax()) + 1
            return _those_from(weights, largest[len(largest) - count], count)
    return np.arange(len(weights))  # the two sums round differently


def _wide_nucleus(weights: NDArray[np.float64], wanted: float) -> Ids:
    """As `_nucleus` where it is many tokens: in time linear in the vocabulary.

    The bits of floats that are not negative are ordered as the floats are. So the weights are
    summed by their first 16 bits, those about the bound by the next 16, and few are left to sort.
    """
    inside, held, count = weights, 0.0, 0  # near the bound; what is above it: its sum, its number
    for place_of_bits in (3, 2):  # of four, the least first
        keys = inside.view(np.uint16)[place_of_bits::4].astype(np.intp)
        sums = held + np.cumsum(np.bincount(keys, weights=inside)[::-1])
        place = min(int(np.searchsorted(sums, wanted)), len(sums) - 1)
        key = len(sums) - 1 - place
        held = float(sums[place - 1]) if place else held
        count += int(np.count_nonzero(keys > key))
        inside = inside[keys == key]
        if not len(inside):  # the sums round differently, and what is above is enough
            return _set_of_largest(weights, count)
    largest = np.sort(inside)[::-1]
    sums = held + np.cumsum(largest)
    place = min(int(np.searchsorted(sums, wanted)), len(sums) - 1)
    return _those_from(weights, largest[place], count + place + 1)


def _largest(values: Row, count: int) -> Ids:
    """Indices of the `count` largest values, largest first; equal ones by index."""
    if count <= 0:
        return np.arange(0)
    candidates = np.flatnonzero(values >= _at_least(values, count))
    order = np.argsort(-values[candidates], kind="stable")
    return candidates[order[:count]]


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


def _set_of_largest(values: Row, count: int) -> Ids:
    """Indices of the `count` largest values in ascending order; lower ones first among equals.

    The set of `_largest` without its order, which is what costs where many are wanted.
    """
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    return _those_from(values, threshold, count)


def _those_from(values: Row, threshold: float, count: int) -> Ids:
    """Indices of the `count` largest values, of which `threshold` is the smallest."""
    kept = values > threshold
    equal = np.flatnonzero(values == threshold)
    kept[equal[: count - int(np.count_nonzero(kept))]] = True
    return np.flatnonzero(kept)


def _ids(token_ids: Iterable[int], vocab_size: int) -> Ids:
    """Token ids as an index. They were checked at the door: a negative one would wrap around."""
    ids = np.fromiter(token_ids, dtype=np.intp)
    assert not len(ids) or 0 <= ids.min() <= ids.max() < vocab_size
    return ids
