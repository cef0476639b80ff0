"""What the output of a step means for its requests. Changes nothing."""

from duetto.core.batch import SampledToken, ScheduledBatch, StepOutput
from duetto.core.errors import EngineError
from duetto.core.request import FinishReason, Request


def check_whole(batch: ScheduledBatch, output: StepOutput) -> None:
    """Raise EngineError unless each request of the batch got what it was to get, or failed."""
    sampled, scores, failed = output
    for item in batch.requests:  # twice a step for each request: it has to be quick
        request_id = item.request_id
        if item.sampling is not None and not sampled.get(request_id):
            if request_id in failed:
                continue
            raise EngineError(f"the executor returned no token for request {request_id}")
        if not scores and not item.prompt_logprob_targets:
            continue  # nearly always
        asked, given = len(item.prompt_logprob_targets), len(scores.get(request_id, ()))
        if given != asked and request_id not in failed:
            raise EngineError(
                f"the executor returned {given} prompt log-probabilities for request "
                f"{request_id}, not {asked}"
            )


def finish_reason(request: Request, tokens: tuple[SampledToken, ...]) -> FinishReason | None:
    """Why a request ends that has just been given `tokens`; None if it goes on."""
    if tokens and tokens[-1].token_id in request.stop_token_ids:
        return FinishReason.STOP
    if request.num_output_tokens >= request.max_tokens:
        return FinishReason.LENGTH
    return None


def stop_reason(request: Request, reason: FinishReason) -> int | None:
    """The caller's own stop token that ended it; the model's end of sequence is no reason."""
    if reason is not FinishReason.STOP or not request.num_output_tokens:
        return None
    last = request.token_ids[-1]
    return last if last in request.sampling.stop_token_ids else None
