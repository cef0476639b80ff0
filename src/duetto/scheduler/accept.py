"""What the output of a step means for its requests: the one place that says it. Changes nothing."""

from duetto.core.batch import (
    RequestResult,
    SampledToken,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
)
from duetto.core.errors import RefusedOutput
from duetto.core.request import FinishReason, Request


def check_whole(batch: ScheduledBatch, output: StepOutput) -> None:
    """Raise RefusedOutput unless each request of the batch got what it was to get, or failed."""
    items = batch.requests
    try:
        results = output.results
        if len(results) != len(items):
            raise RefusedOutput(
                f"the executor returned {len(results)} results for {len(items)} requests"
            )
        for item, result in zip(items, results, strict=True):
            is_next_token = len(result.tokens) == 1 and len(item.rows) == 1
            is_whole = is_next_token or _is_run(item, result.tokens)
            if item.look is not None or result.looked:
                is_whole = is_whole and _has_looked(item, result.looked)
            if item.pooling is not None or result.embedding:
                is_whole = is_whole and _is_embedded(item, result.embedding)
            if is_whole and len(result.scores) == len(item.prompt_logprob_targets):
                continue
            if result.error is None:
                raise RefusedOutput(_what_is_wrong(item, result))
    except (AttributeError, TypeError) as error:
        raise RefusedOutput("the executor returned something else than a StepOutput") from error


def _is_run(item: ScheduledRequest, tokens: tuple[SampledToken, ...]) -> bool:
    """Whether these may be accepted drafts and a token after them; nothing where none is wanted."""
    if not item.rows:
        return not tokens
    if not 1 <= len(tokens) <= len(item.rows):
        return False
    drafts = item.token_ids[len(item.token_ids) - item.num_drafts :]
    return all(t.token_id == draft for t, draft in zip(tokens[:-1], drafts, strict=False))


def _has_looked(item: ScheduledRequest, looked: tuple[float, ...]) -> bool:
    """A number for each position; whole ones of attention, so that they add up in any order."""
    look = item.look
    if look is None:
        return not looked
    if look.method == "deviation":
        return len(looked) == len(item.token_ids)
    num_positions = sum([end - start for start, end in look.ranges])
    return len(looked) == num_positions and all(float(x).is_integer() for x in looked)


def _is_embedded(item: ScheduledRequest, embedding: bytes) -> bool:
    """Numbers of 4 bytes, as many as were asked for; none where none are wanted."""
    if item.pooling is None:
        return not embedding
    num_bytes = len(embedding)
    asked = item.pooling.dimensions
    return num_bytes == 4 * asked if asked else num_bytes > 0 and num_bytes % 4 == 0


def _what_is_wrong(item: ScheduledRequest, result: RequestResult) -> str:
    asked, given = len(item.prompt_logprob_targets), len(result.scores)
    if given != asked:
        return (
            f"the executor returned {given} prompt log-probabilities for request "
            f"{item.request_id}, not {asked}"
        )
    if not _has_looked(item, result.looked):
        return (
            f"the executor returned {len(result.looked)} numbers for what request "
            f"{item.request_id} looks at ({item.look}), not a number for each position"
        )
    if not _is_embedded(item, result.embedding):
        return (
            f"the executor returned an embedding of {len(result.embedding)} bytes for request "
            f"{item.request_id}, which asks for {item.pooling}"
        )
    if item.rows and not result.tokens:
        return f"the executor returned no token for request {item.request_id}"
    return (
        f"the executor returned {len(result.tokens)} tokens for request {item.request_id}, which "
        f"are not accepted drafts and a token after them ({item.num_drafts} drafts)"
    )


def accept(
    request: Request, tokens: tuple[SampledToken, ...]
) -> tuple[tuple[SampledToken, ...], FinishReason | None]:
    """Which of the tokens that a step sampled the request has, and why it ends with them, if it
    does. The first stop token or the limit ends it: what is beyond was never asked for."""
    num_left = request.max_tokens - (len(request.token_ids) - len(request.prompt_token_ids))
    for count, sampled in enumerate(tokens, start=1):
        if sampled.token_id in request.stop_token_ids:
            return tokens[:count], FinishReason.STOP
        if count == num_left:
            return tokens[:count], FinishReason.LENGTH
    return tokens, None


def stop_reason(request: Request, reason: FinishReason) -> int | None:
    """The caller's own stop token that ended it; the model's end of sequence is no reason."""
    if reason is not FinishReason.STOP or not request.num_output_tokens:
        return None
    last = request.token_ids[-1]
    return last if last in request.sampling.stop_token_ids else None
