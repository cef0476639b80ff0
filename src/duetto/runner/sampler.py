"""From one row of logits to one token. Knows no batch, no request and no model.

Every function looks at one row, so a request's token and log-probabilities are bit-identical in
any company. A row is fp32; arithmetic on it is in float64, or gives the token that float64 gives.

The order of steps is vLLM's (https://docs.vllm.ai/en/v0.22.1/api/vllm/v1/sample/sampler/):

    1. log-probabilities, if asked for, from the raw logits, before everything below
    2. the grammar's mask, and allowed_token_ids
    3. forbidden tokens: the ends of bad words, and ends of sequence before min_tokens
    4. logit_bias
    5. repetition penalty (prompt and output), then frequency and presence penalty (output)
    6. temperature 0: the largest logit, the lowest id among equals; done
    7. temperature
    8. min_p, top_k, top_p: top_p of what the first two leave (runner/candidates.py)
    9. draw: Gumbel-max (runner/gumbel.py)

Last of all, an answer that could no longer end in time is led to an end of its grammar.

Steps 6 to 9 of a fp32 row are one native call (csrc/sampler.cpp) where there is a native module.

Where vLLM leaves room, this is what happens here: top_k keeps exactly k tokens, lower ids first
among equals (vLLM keeps all that equal the k-th); a small temperature is taken as it is (vLLM calls
it greedy below 1e-5); a rank counts strictly likelier tokens.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from duetto.backends.cpu.native import native
from duetto.core.batch import SampledToken, SamplingInput, TokenLogprob
from duetto.core.errors import EngineError
from duetto.core.sampling_params import SamplingParams
from duetto.runner import gumbel
from duetto.runner.candidates import Row, candidates, largest, lowest
from duetto.runner.gumbel import Ids


class RowConstraint(NamedTuple):
    """What a grammar says of one row."""

    ceiling: NDArray[np.float32]  # [vocabulary]: -inf for what must not follow, inf for the rest
    steer: Callable[[int], int]  # the token to take where this one was sampled


def sample_token(
    row: Row, sampling: SamplingInput, constraint: RowConstraint | None = None
) -> SampledToken:
    """Choose the next token from raw logits [vocabulary]; `row` is not changed.

    Raises EngineError, with a message that may be shown, if the logits are not finite or if the
    request's own masks leave nothing to choose from.
    """
    params = sampling.params
    first = _finite_argmax(row)
    if constraint is None:
        token_id = _sampled(row, first, sampling)
    else:
        token_id = _sampled_within(row, constraint, sampling)
    if params.logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, _logprob(row, token_id, params.logprobs))


def _sampled(row: Row, first: int, sampling: SamplingInput) -> int:
    """Steps 2 to 9; row[first] is the largest logit."""
    changes = _changes(row, sampling)
    if changes is None and sampling.params.is_greedy:
        return first
    if _is_native(row):
        return _choose(row, first, changes, sampling)
    return _choose_in_numpy(row, first, changes, sampling)


def _sampled_within(row: Row, constraint: RowConstraint, sampling: SamplingInput) -> int:
    sampling = _without_held_back(sampling, constraint.ceiling)
    masked = np.minimum(row, constraint.ceiling)
    first = int(masked.argmax())
    if masked[first] == -np.inf:
        raise _nothing_left()
    token_id = _sampled(masked, first, sampling)
    steered = constraint.steer(token_id)
    return steered if _may_take(steered, sampling) else token_id


def _without_held_back(sampling: SamplingInput, ceiling: NDArray[np.float32]) -> SamplingInput:
    """Ends are not held back where nothing else may follow: the grammar wins over min_tokens."""
    if not sampling.held_back_token_ids:
        return sampling
    others = ceiling > 0
    others[_ids(sampling.forbidden_token_ids, len(others))] = False
    asked = sampling.params.allowed_token_ids
    if (others if asked is None else others[_ids(asked, len(others))]).any():
        return sampling
    left = set(sampling.forbidden_token_ids) - set(sampling.held_back_token_ids)
    return sampling._replace(forbidden_token_ids=tuple(sorted(left)))


def _may_take(token_id: int, sampling: SamplingInput) -> bool:
    """Whether the request's own masks, beside its grammar, let it have the token."""
    asked = sampling.params.allowed_token_ids
    is_asked = asked is None or token_id in asked
    return is_asked and token_id not in sampling.forbidden_token_ids


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
    likeliest = largest(row, num_top)
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
        raise not_finite()
    return token_id


def not_finite() -> EngineError:
    return EngineError("the model's output for this request is not finite")


def _is_native(row: Row) -> TypeGuard[NDArray[np.float32]]:
    return gumbel.HAS_NATIVE and row.dtype == np.float32 and row.flags.c_contiguous


_NONE: Ids = np.array([], dtype=np.intp)


class _Changes(NamedTuple):
    """Logits after steps 2 to 5 of the tokens that these name; the others' are as they were."""

    ids: Ids  # [n], ascending
    logits: NDArray[np.float64]  # [n]
    others_allowed: bool  # else they are -inf


def _changes(row: Row, sampling: SamplingInput) -> _Changes | None:
    """Steps 2 to 5; None if they change nothing."""
    params, size = sampling.params, len(row)
    some = params.allowed_token_ids is not None or params.logit_bias or params.needs_history
    if not some and not sampling.forbidden_token_ids:
        return None
    forbidden = _ids(sampling.forbidden_token_ids, size)
    biased = _ids(params.logit_bias, size)
    prompt, output = _NONE, _NONE
    if params.needs_history:
        output = _ids(sampling.output_token_ids, size)
    if params.repetition_penalty != 1.0:  # it alone looks at the prompt
        prompt = _ids(sampling.prompt_token_ids, size)
    if params.allowed_token_ids is not None:
        ids = np.unique(_ids(params.allowed_token_ids, size))
    else:
        ids = np.unique(np.concatenate((forbidden, biased, prompt, output)))
        if not len(ids):
            return None
    logits = row[ids].astype(np.float64)
    logits[_places(forbidden, ids)] = -np.inf
    if params.logit_bias:
        left = np.isin(biased, ids)
        bias = np.array([*params.logit_bias.values()])
        logits[_places(biased[left], ids)] += bias[left]
    if params.needs_history:
        _penalize(logits, _places(prompt, ids), _places(output, ids), params)
    return _Changes(ids, logits, params.allowed_token_ids is None)


def _places(token_ids: Ids, ids: Ids) -> Ids:
    """Where those of the token ids that are among `ids` (ascending) stand there."""
    places: Ids = np.minimum(np.searchsorted(ids, token_ids), len(ids) - 1)
    return places[np.flatnonzero(ids[places] == token_ids)]


def _penalize(
    logits: NDArray[np.float64], prompt: Ids, output: Ids, params: SamplingParams
) -> None:
    """Repetition penalty as in CTRL (Keskar et al., 2019), over prompt and output, in place.

    Frequency and presence penalty are OpenAI's, over the output alone. `prompt` and `output` are
    indices of the logits.
    """
    counts = np.bincount(output, minlength=len(logits))
    seen = counts > 0
    seen[prompt] = True
    repeated = logits[seen]
    with np.errstate(over="ignore"):  # a penalty just above 0: the largest number, not infinity
        penalized = np.where(
            repeated > 0,
            repeated / params.repetition_penalty,
            repeated * params.repetition_penalty,
        )
    logits[seen] = np.minimum(penalized, np.finfo(np.float64).max)
    logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _choose(
    row: NDArray[np.float32], first: int, changes: _Changes | None, sampling: SamplingInput
) -> int:
    """Steps 6 to 9, native; row[first] is the largest logit before the changes."""
    params, logit = sampling.params, float(row[first])
    ids, changed = None, None
    if changes is not None:
        ids, changed, others_allowed = changes
        row = row.copy() if others_allowed else np.full_like(row, -np.inf)
        row[ids] = -np.inf
        first, logit = _first_of_both(row, ids, changed)
    if params.is_greedy:
        return first
    return native.draw_filtered(
        row,
        (logit, first),
        ids,
        changed,
        params.temperature,
        params.top_k,
        lowest(logit, params),
        params.top_p,
        gumbel.key_of(sampling.seed, sampling.num_output_tokens),
    )


def _first_of_both(
    row: NDArray[np.float32], ids: Ids, changed: NDArray[np.float64]
) -> tuple[int, float]:
    """The likeliest token, the first of equals, of a row and of what was taken out of it, and its
    logit."""
    first, logit = native.finite_argmax(row), -math.inf  # -1: all are -inf
    if first >= 0:
        logit = float(row[first])
    place = int(changed.argmax())
    if changed[place] > logit or (changed[place] == logit and ids[place] < first):
        first, logit = int(ids[place]), float(changed[place])
    if logit == -math.inf:
        raise _nothing_left()
    return first, logit


def _choose_in_numpy(
    row: Row, first: int, changes: _Changes | None, sampling: SamplingInput
) -> int:
    """The slow twin of `_choose`."""
    if changes is not None:
        logits = row.astype(np.float64)
        if not changes.others_allowed:
            logits[:] = -np.inf
        logits[changes.ids] = changes.logits
        row, first = logits, int(logits.argmax())
        if logits[first] == -np.inf:
            raise _nothing_left()
    if sampling.params.is_greedy:
        return first
    key = gumbel.key_of(sampling.seed, sampling.num_output_tokens)
    return gumbel.draw(*candidates(row, sampling.params), key)


def _nothing_left() -> EngineError:
    return EngineError(
        "no token is left to sample: allowed_token_ids, bad_words, min_tokens and the grammar "
        "together forbid the whole vocabulary"
    )


def _ids(token_ids: Iterable[int], vocab_size: int) -> Ids:
    """Token ids as an index. They were checked at the door: a negative one would wrap around."""
    ids = np.fromiter(token_ids, dtype=np.intp)
    assert not len(ids) or 0 <= ids.min() <= ids.max() < vocab_size
    return ids
