"""What looks tell of a step, request by request.

Looks are rare: they stand beside the ordinary step, which does nothing for them. A request's logits
and KV are the same bits with a look at attention as without. Knows no choice: it tells, and others
choose what is computed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from duetto.backends.backend import Backend, FloatArray, ScoreArray
from duetto.core.batch import RequestResult, ScheduledBatch, ScheduledRequest
from duetto.core.errors import EngineError
from duetto.runner.step_arrays import build_looks, build_step_arrays

# What rows of logits give the requests of a batch: results_of, with the masks of the step.
Sampling = Callable[[ScheduledBatch, FloatArray, tuple[int, ...]], list[RequestResult]]


def looks_at_deviation(request: ScheduledRequest) -> bool:
    """Whether it goes through the first layers only."""
    return request.look is not None and request.look.method == "deviation"


def look(
    batch: ScheduledBatch, backend: Backend, kv: Any, block_size: int, sample: Sampling
) -> list[RequestResult]:
    """Compute a step of which some requests look. Those that look at deviations are computed apart
    from the others, which go through all layers."""
    deviating = [r for r in batch.requests if looks_at_deviation(r)]
    others = [r for r in batch.requests if not looks_at_deviation(r)]
    results: list[RequestResult] = []
    if deviating:
        results += look_at_deviations(deviating, backend, kv, block_size)
    if others:
        batch_of_others = ScheduledBatch(tuple(others))
        step, logit_starts = build_step_arrays(batch_of_others, block_size)
        logits, scores = backend.look_attention(step, kv, build_looks(others))
        own = sample(batch_of_others, logits, logit_starts)
        results += with_scores_of_looks(others, own, scores)
    ids = [request.request_id for request in deviating + others]
    by_id = dict(zip(ids, results, strict=True))
    return [by_id[request.request_id] for request in batch.requests]


def look_at_deviations(
    requests: Sequence[ScheduledRequest], backend: Backend, kv: Any, block_size: int
) -> list[RequestResult]:
    """Compute requests that go through the first layers only; the result of each."""
    step, _ = build_step_arrays(ScheduledBatch(tuple(requests)), block_size)
    try:
        scores = backend.look_deviation(step, kv)
    except EngineError as error:  # the model is too small, for each of them
        return [RequestResult(error=str(error)) for _ in requests]
    ends = np.cumsum([len(request.token_ids) for request in requests])
    parts = np.split(scores, ends[:-1])
    # What lay where nothing was brought may be anything: it is no fault of this request. Who
    # chooses takes what is no number for the largest.
    return [RequestResult(looked=tuple(part.tolist())) for part in parts]


def with_scores_of_looks(
    requests: Iterable[ScheduledRequest],
    results: Iterable[RequestResult],
    scores: Iterable[ScoreArray],
) -> list[RequestResult]:
    """The results, with those of the looks among the requests, in the same order."""
    left = iter(scores)
    return [
        result if request.look is None else with_scores(result, next(left))
        for request, result in zip(requests, results, strict=True)
    ]


def with_scores(result: RequestResult, scores: ScoreArray) -> RequestResult:
    """A result with what its look tells; scores that are no numbers are an error."""
    if result.error is not None:
        return result
    if not np.isfinite(scores).all():
        return RequestResult(error="the model's keys and values for this request are not finite")
    return result._replace(looked=tuple(scores.tolist()))
