"""Which rows of a step a device samples, and what it must know of them.

It samples what depends on nothing but the row's logits, its own parameters and its random stream.
All else is sampled on the host: log-probabilities, masks, penalties, biases, forbidden tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from duetto.backends.backend import IntArray
from duetto.backends.device import SampleArrays
from duetto.core.batch import SamplingInput, ScheduledRequest
from duetto.runner import gumbel
from duetto.runner.candidates import min_gap


class DeviceRows(NamedTuple):
    """Of a step: what is sampled where."""

    on_device: tuple[bool, ...]  # for each request
    sampling: SampleArrays | None  # None: no request's rows
    wants_logits: bool  # the host needs some row's


def device_rows(
    requests: Sequence[ScheduledRequest], logit_starts: tuple[int, ...], width: int
) -> DeviceRows:
    """`width` is that of a row of logits. Rows of others than those sampled on the device are
    sampled too, as greedy ones: nobody asks for what they give."""
    on_device = tuple([samples_on_device(request) for request in requests])
    has_logits = [end > start for start, end in pairwise(logit_starts)]
    wants_logits = any(has and not on for has, on in zip(has_logits, on_device, strict=True))
    if not any(on_device):
        return DeviceRows(on_device, None, wants_logits)
    rows: list[SamplingInput | None] = [None] * logit_starts[-1]
    for request, start, is_on in zip(requests, logit_starts, on_device, strict=False):
        if is_on:
            rows[start : start + len(request.rows)] = request.rows
    return DeviceRows(on_device, _sample_arrays(rows, width), wants_logits)


def samples_on_device(request: ScheduledRequest) -> bool:
    """Whether all of its rows may be sampled where nothing but parameters and keys are known."""
    rows = request.rows
    if not rows or request.prompt_logprob_targets or request.look is not None:
        return False
    params = rows[0].params
    if params.logprobs is not None or params.needs_history or rows[0].grammar is not None:
        return False
    if params.logit_bias or params.allowed_token_ids is not None:
        return False
    return not any(row.forbidden_token_ids for row in rows)


def _sample_arrays(rows: Sequence[SamplingInput | None], width: int) -> SampleArrays:
    temperatures: list[float] = []
    keys: list[int] = []
    top_ks: list[int] = []
    top_ps: list[float] = []
    min_gaps: list[float] = []
    for row in rows:
        params = None if row is None else row.params
        if row is None or params is None or params.is_greedy:
            temperatures.append(0.0)
            keys.append(0)
            top_ks.append(0)
            top_ps.append(1.0)
            min_gaps.append(-np.inf)
            continue
        temperatures.append(params.temperature)
        keys.append(gumbel.key_of(row.seed, row.num_output_tokens))
        top_ks.append(params.top_k if 0 < params.top_k < width else 0)
        top_ps.append(params.top_p)
        min_gaps.append(min_gap(params))
    return SampleArrays(
        np.array(temperatures, np.float64),
        np.array(keys, np.uint64),
        np.array(top_ks, np.int32),
        np.array(top_ps, np.float64),
        np.array(min_gaps, np.float64),
    )


def feedback_of(places: dict[int, int], num_tokens: int) -> IntArray | None:
    """As DeviceBackend.start takes it, of the tokens that are samples: their rows, by place."""
    if not places:
        return None
    feedback = np.full(num_tokens, -1, np.int32)
    feedback[list(places)] = list(places.values())
    return feedback
