"""From a Request to the frozen plan of what it computes in one step. Changes nothing."""

from duetto.core.batch import SamplingInput, ScheduledRequest
from duetto.core.request import Request
from duetto.core.shape import RequestShape


def plan(request: Request, count: int) -> ScheduledRequest:
    """Let `request` compute its next `count` tokens.

        token_ids     0 .......... start .......... end .......... num_tokens
                      |-- has KV ---|-- this step ---|--- later steps ---|

    It samples if end == num_tokens: only then are the logits of its last token known.
    """
    start = request.num_computed_tokens
    end = start + count
    scored = request.sampling.prompt_logprobs is not None
    return ScheduledRequest(
        request_id=request.request_id,
        token_ids=tuple(request.token_ids[start:end]),
        num_computed_tokens=start,
        block_table=tuple(request.block_table),
        rows=(sampling_input(request),) if end == request.num_tokens else (),
        prompt_logprob_targets=request.prompt_token_ids[start + 1 : end + 1] if scored else (),
        num_prompt_logprobs=request.sampling.prompt_logprobs or 0,
    )


def shape_of(request: Request, num_past: int, count: int) -> RequestShape:
    """The shape of what `plan` would give, for a request with `num_past` tokens computed."""
    end = num_past + count
    num_rows = int(end == request.num_tokens)
    if request.sampling.prompt_logprobs is not None:
        num_rows += max(0, min(end, request.num_prompt_tokens - 1) - num_past)
    return RequestShape(count, num_past, num_rows)


def sampling_input(request: Request) -> SamplingInput:
    """Everything the sampler needs, so that the executor keeps no state per request."""
    history = request.sampling.needs_history
    return SamplingInput(
        params=request.sampling,
        seed=request.seed,
        num_output_tokens=request.num_output_tokens,
        forbidden_token_ids=forbidden_token_ids(request),
        prompt_token_ids=request.prompt_token_ids if history else (),
        output_token_ids=tuple(request.output_token_ids) if history else (),
    )


def forbidden_token_ids(request: Request) -> tuple[int, ...]:
    """Tokens that must not come next: ends before min_tokens, and the last token of a bad word
    whose other tokens have just been generated."""
    is_short = request.num_output_tokens < request.sampling.min_tokens
    if not is_short and not request.bad_word_ids:
        return ()  # nearly always
    forbidden: set[int] = set()
    if is_short:
        forbidden |= request.stop_token_ids
    forbidden.update(word[0] for word in request.bad_words_after(None))
    num_output = request.num_output_tokens
    for word in request.bad_words_after(request.token_ids[-1]):
        size = len(word) - 1
        if size <= num_output and tuple(request.token_ids[-size:]) == word[:-1]:
            forbidden.add(word[-1])
    return tuple(sorted(forbidden))
