"""From a Request to the frozen plan of what it computes in one step. Changes nothing."""

from collections.abc import Sequence

from duetto.core.batch import PLACEHOLDER, SamplingInput, ScheduledRequest
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.core.shape import RequestShape, shape_at
from duetto.core.structured import Grammar
from duetto.scheduler.choice import look_at, look_method
from duetto.scheduler.reuse import moves, next_positions, next_source, plan_source


def plan(request: Request, count: int) -> ScheduledRequest:
    """Let `request` compute its next `count` tokens.

        token_ids     0 .......... start .......... end .......... num_tokens
                      |-- has KV ---|-- this step ---|--- later steps ---|

    It samples if end is the number of its tokens, those that steps in flight sample among them:
    only then are the logits of its last token known. The last one then may be a placeholder.
    """
    if request.candidates and request.num_written_tokens < len(request.prompt_token_ids):
        return _plan_beside_reused(request, count)
    start, known = request.num_computed_tokens, request.token_ids
    end = start + count
    token_ids = tuple(known[start:end])
    if len(token_ids) < count:  # one at most: who samples while one is unknown computes that one
        token_ids = (*token_ids, PLACEHOLDER)
    samples = end == len(known) + request.num_pending_tokens
    num_prompt_logprobs = request.sampling.prompt_logprobs
    is_scored = num_prompt_logprobs is not None
    if request.pooling is not None:
        return _plan_pooled(request, token_ids, is_last=samples)
    return ScheduledRequest(  # by position: every step makes one for each request
        request.request_id,
        token_ids,
        start,
        tuple(request.block_table),
        (sampling_input(request),) if samples else (),
        request.prompt_token_ids[start + 1 : end + 1] if is_scored else (),
        num_prompt_logprobs or 0,
        0,  # num_drafts
        None,  # positions
        request.timings.num_preemptions,
    )


def _plan_pooled(
    request: Request, token_ids: tuple[int, ...], *, is_last: bool
) -> ScheduledRequest:
    return ScheduledRequest(
        request.request_id,
        token_ids,
        request.num_computed_tokens,
        tuple(request.block_table),
        epoch=request.timings.num_preemptions,
        pooling=request.pooling if is_last else None,
    )


def _plan_beside_reused(request: Request, count: int) -> ScheduledRequest:
    """First the texts that are not there, each alone; then the tokens that are not reused."""
    source = next_source(request.sources)
    if source is not None:
        return plan_source(request, source, count)
    known = request.token_ids
    positions = next_positions(request, request.num_computed_tokens, count)
    first, end = positions[0], positions[-1] + 1
    is_chosen = request.choosing is None  # else it cannot sample yet
    samples = is_chosen and end == len(known) + request.num_pending_tokens
    return ScheduledRequest(
        request.request_id,
        tuple([known[p] if p < len(known) else PLACEHOLDER for p in positions]),
        first,
        tuple(request.block_table),
        (sampling_input(request),) if samples else (),
        positions=tuple(positions) if end - first > count else None,
        epoch=request.timings.num_preemptions,
        moves=moves(request, positions),
        look=look_at(request, positions[-1]),
    )


def with_drafts(
    request: Request, item: ScheduledRequest, drafts: tuple[int, ...]
) -> ScheduledRequest:
    """The plan of a request that samples, which also verifies `drafts`. Its blocks must do."""
    rows = [sampling_input(request, drafts[:count]) for count in range(1, len(drafts) + 1)]
    return item._replace(
        token_ids=item.token_ids + drafts,
        block_table=tuple(request.block_table),
        rows=(*item.rows, *rows),
        num_drafts=len(drafts),
    )


def resolved(request: Request, item: ScheduledRequest) -> ScheduledRequest:
    """The plan with a known token for its placeholder."""
    if item.token_ids[-1] != PLACEHOLDER:
        return item
    return item._replace(token_ids=(*item.token_ids[:-1], request.token_ids[item.end - 1]))


def may_go_on(request: Request) -> bool:
    """Whether a request with steps in flight can be planned before their results are in."""
    if request.has_drafts_in_flight or not request.num_outputs_left:
        return False
    depends = request.sampling.needs_history or bool(request.bad_word_ids)
    depends = depends or request.grammar is not None
    return not (depends and request.num_pending_tokens)


def shape_of(
    request: Request, num_past: int, count: int, sources: Sequence[Source] = ()
) -> RequestShape:
    """The shape of what `plan` would give, for a request with `num_past` tokens computed, which
    will have `sources` if it is admitted."""
    if request.candidates and num_past < len(request.prompt_token_ids):
        return _shape_beside_reused(request, num_past, count, sources)
    end = num_past + count
    num_rows = int(end == request.num_tokens + request.num_pending_tokens)
    if request.sampling.prompt_logprobs is not None:
        num_rows += max(0, min(end, request.num_prompt_tokens - 1) - num_past)
    return RequestShape(count, num_past, num_rows)


def _shape_beside_reused(
    request: Request, num_past: int, count: int, sources: Sequence[Source]
) -> RequestShape:
    source = next_source(sources or request.sources)
    if source is not None:
        return RequestShape(count, source.num_computed, 0)
    positions = next_positions(request, num_past, count)
    end = positions[-1] + 1
    num_rows = int(
        request.choosing is None and end == request.num_tokens + request.num_pending_tokens
    )
    if end - positions[0] > count:
        return shape_at(positions, num_rows)
    is_short = look_method(request, end - 1) == "deviation"
    return RequestShape(count, positions[0], num_rows, is_short)


def sampling_input(request: Request, drafts: tuple[int, ...] = ()) -> SamplingInput:
    """Everything the sampler needs after `drafts`, so that the executor keeps no state per
    request."""
    params, num_output = request.sampling, num_outputs(request, drafts)
    if request.grammar is not None:
        return _input_with_grammar(request, request.grammar, drafts)
    if num_output >= params.min_tokens and not request.bad_word_ids and not params.needs_history:
        return SamplingInput(params, request.seed, num_output)  # nearly always
    history = params.needs_history
    return SamplingInput(
        params=params,
        seed=request.seed,
        num_output_tokens=num_output,
        forbidden_token_ids=forbidden_token_ids(request, drafts),
        prompt_token_ids=request.prompt_token_ids if history else (),
        output_token_ids=(*request.output_token_ids, *drafts) if history else (),
    )


def _input_with_grammar(
    request: Request, grammar: Grammar, drafts: tuple[int, ...]
) -> SamplingInput:
    params, num_output = request.sampling, num_outputs(request, drafts)
    held_back: frozenset[int] = frozenset()
    if num_output < params.min_tokens:
        held_back = request.stop_token_ids - _ends_of_bad_words(request, drafts)
    return SamplingInput(
        params=params,
        seed=request.seed,
        num_output_tokens=num_output,
        forbidden_token_ids=forbidden_token_ids(request, drafts),
        prompt_token_ids=request.prompt_token_ids if params.needs_history else (),
        output_token_ids=(*request.output_token_ids, *drafts),
        grammar=grammar,
        held_back_token_ids=tuple(sorted(held_back)),
        num_left=request.max_tokens - num_output,
    )


def num_outputs(request: Request, drafts: tuple[int, ...]) -> int:
    """Tokens of the answer before the one that is sampled after `drafts`."""
    num_known = len(request.token_ids) - len(request.prompt_token_ids)
    return num_known + request.num_pending_tokens + len(drafts)


def forbidden_token_ids(request: Request, drafts: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Tokens that must not come after `drafts`: ends before min_tokens, and the last token of a
    bad word whose other tokens have just been generated."""
    forbidden = _ends_of_bad_words(request, drafts)
    if num_outputs(request, drafts) < request.sampling.min_tokens:
        forbidden |= request.stop_token_ids
    return tuple(sorted(forbidden))


def _ends_of_bad_words(request: Request, drafts: tuple[int, ...]) -> set[int]:
    num_output = num_outputs(request, drafts)
    forbidden = {word[0] for word in request.bad_words_after(None)}
    token_ids = [*request.token_ids, *drafts] if drafts else request.token_ids
    for word in request.bad_words_after(token_ids[-1]):
        size = len(word) - 1
        if size <= num_output and tuple(token_ids[-size:]) == word[:-1]:
            forbidden.add(word[-1])
    return forbidden
