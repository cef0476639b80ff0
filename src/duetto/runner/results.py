"""What a request's rows of logits give it. Knows no backend, and nothing of other steps."""

from duetto.backends.backend import FloatArray
from duetto.core.batch import RequestResult, ScheduledBatch, ScheduledRequest, TokenLogprob
from duetto.core.errors import EngineError
from duetto.runner.masks import Constrained, ConstrainedRows
from duetto.runner.pooling import pooled
from duetto.runner.sampler import token_logprob
from duetto.runner.verify import verify


def results_of(
    batch: ScheduledBatch,
    logits: FloatArray,
    logit_starts: tuple[int, ...],
    constrained: Constrained,
) -> list[RequestResult]:
    """Of each request, whose rows are those that build_step_arrays says."""
    return [
        result_of(request, logits, start, constrained.get(request.request_id))
        for request, start in zip(batch.requests, logit_starts[:-1], strict=True)
    ]


def result_of(
    request: ScheduledRequest,
    logits: FloatArray,
    start: int,
    constrained: ConstrainedRows | None = None,
) -> RequestResult:
    """What its rows of logits, from `start` on, give one request: those that score its prompt come
    first. Of a program without its head the row is a hidden state."""
    if request.pooling is not None:
        return pooled(request.pooling, logits[start])
    rows = None
    if constrained is not None:
        if constrained.error is not None:
            return RequestResult(error=constrained.error)
        rows = constrained.rows
    try:
        if not request.prompt_logprob_targets:
            return RequestResult(verify(request, logits, start, rows) if request.rows else ())
        scores = _score_prompt(request, logits[start:])
        tokens = verify(request, logits, start + len(scores), rows) if request.rows else ()
        return RequestResult(tokens, scores=scores)
    except EngineError as error:
        return RequestResult(error=str(error))


def _score_prompt(request: ScheduledRequest, rows: FloatArray) -> tuple[TokenLogprob, ...]:
    """How likely the model found the prompt's own next tokens: row i predicts token i + 1."""
    targets = request.prompt_logprob_targets
    return tuple(
        token_logprob(row, target, request.num_prompt_logprobs)
        for row, target in zip(rows[: len(targets)], targets, strict=True)
    )
