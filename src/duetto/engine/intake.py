"""From token ids and sampling parameters to Requests that are complete and already checked.

Both doors, the server and LLM, come through here, so that a request is judged in one place. Knows
no HTTP, no chat and no engine: it asks the codec and the configuration, and changes nothing.
"""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from duetto.core.cache_control import CachedText
from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.core.reuse import TokenRange
from duetto.core.reuse_choice import MAX_SEGMENTS, ReuseAsked, too_many_segments
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar
from duetto.core.text import TextCodec
from duetto.engine.segments import SegmentedIds
from duetto.scheduler.reuse import text_hashes


def make_request(
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    codec: TextCodec,
    config: SchedulerConfig,
    request_id: str,
    arrival_time: float,
    default_max_tokens: int | None = None,
    default_seed: int | None = None,
    priority: int = 0,
    cache_salt: bytes = b"",
    tenant: bytes = b"",
    bad_word_ids: tuple[tuple[int, ...], ...] | None = None,
    reuse: ReuseAsked | None = None,
    grammar: Grammar | None = None,
    end_token_ids: frozenset[int] = frozenset(),
) -> Request:
    """The request that answers one prompt, before `fan_out` makes `sampling.n` of it.

    `max_tokens` None becomes `default_max_tokens`, or all the room there is if that is less; what
    a caller asked for is never cut short but refused if it does not fit. A seed comes from
    `sampling`, else from `default_seed`, else from the operating system. Who makes many requests
    of one `sampling` brings its `encode_bad_words` as `bad_word_ids`. What of `reuse` cannot be
    done is refused, or all is computed, as its choice says. `grammar` is what a GrammarMaker has
    made of `sampling.structured_outputs`, or of something else that the answer must be.
    `end_token_ids` end this answer as the model's end of sequence does.

    Raises InvalidRequest, naming the field ("prompt" for the ids), if a token id is outside the
    vocabulary, the prompt is empty, or no token may ever be sampled; RequestTooLong if it could
    never fit.
    """
    check_prompt(prompt_token_ids, codec.vocab_size)
    sampling.check_vocabulary(codec.vocab_size)
    sampling = sampling.with_logprobs(codec.vocab_size, config.max_logprobs)
    if sampling.thinking_budget is not None:  # a chat's plan has made a grammar of it
        raise InvalidRequest("thinking_budget", "is for chats: in a prompt nothing is reasoning")
    sampling = _without_constraint(sampling, grammar)
    ends = frozenset() if sampling.ignore_eos else codec.eos_token_ids | end_token_ids
    seeds = (sampling.seed, default_seed, secrets.randbits(63))
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=sampling,
        max_tokens=_resolve_max_tokens(len(prompt_token_ids), sampling, config, default_max_tokens),
        seed=next(seed for seed in seeds if seed is not None),
        stop_token_ids=ends | frozenset(sampling.stop_token_ids),
        bad_word_ids=(
            encode_bad_words(sampling.bad_words, codec) if bad_word_ids is None else bad_word_ids
        ),
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
        tenant=tenant,
        grammar=grammar,
    )
    _check_choice(request, codec.vocab_size)
    config.check_fits(request)
    return request if reuse is None else _reusing(request, reuse, config)


def _without_constraint(sampling: SamplingParams, grammar: Grammar | None) -> SamplingParams:
    """From here on the grammar says it all: a schema need not be told in each step."""
    if grammar is None and sampling.structured_outputs is not None:
        raise InvalidRequest("structured_outputs", "are not supported by this engine")
    if grammar is not None and sampling.ignore_eos:
        raise InvalidRequest("ignore_eos", "with a grammar: the answer ends where that does")
    if sampling.structured_outputs is None:
        return sampling
    return replace(sampling, structured_outputs=None)


def _reusing(request: Request, asked: ReuseAsked, config: SchedulerConfig) -> Request:
    """The request with the reuse that is asked for, or with the reason why there is none."""
    try:
        if asked.refusal is not None:
            raise asked.refusal
        request = replace(request, reuse=asked.choice.over(asked.segments))
        config.check_fits(request)
    except InvalidRequest as error:
        if asked.choice.on_unsupported == "refuse":
            raise
        return replace(request, reuse=asked.choice.over(()), why_not_reused=str(error))
    return request


def cached_text(
    token_ids: Sequence[int],
    *,
    codec: TextCodec,
    config: SchedulerConfig,
    cache_salt: bytes,
    is_segment: bool = False,
) -> CachedText:
    """What a request of these tokens and this salt would find in the KV cache, or leave there: full
    blocks, and of a segment, which nothing follows, the last one too.

    Raises InvalidRequest as `make_request` does, and where there is no prefix caching.
    """
    if not config.enable_prefix_caching:
        raise InvalidRequest("cache", "needs the prefix cache: --enable-prefix-caching")
    check_prompt(token_ids, codec.vocab_size)
    num_tokens, size = len(token_ids), config.block_size
    if num_tokens > config.context_length:
        raise config.too_long(num_tokens, 0)
    num_kept = num_tokens if is_segment else num_tokens // size * size
    hashes = text_hashes(tuple(token_ids[:num_kept]), config, cache_salt)
    return CachedText(num_tokens, tuple(hashes), is_segment)


class MeantText(NamedTuple):
    """Whose KV is meant: a prompt's, with those of its segments that may stand elsewhere too, or a
    segment's."""

    text: CachedText
    places: tuple[TokenRange, ...] = ()  # of the segments in the prompt
    segments: tuple[CachedText, ...] = ()


def meant_text(
    prompt: SegmentedIds,
    *,
    codec: TextCodec,
    config: SchedulerConfig,
    cache_salt: bytes,
    is_segment: bool = False,
) -> MeantText:
    """Raises InvalidRequest as `cached_text` does, and for too many segments."""
    token_ids, places = prompt
    if len(places) > MAX_SEGMENTS:
        raise too_many_segments("prompt", len(places))
    how: dict[str, Any] = {"codec": codec, "config": config, "cache_salt": cache_salt}
    text = cached_text(token_ids, is_segment=is_segment, **how)
    segments = [cached_text(token_ids[s:e], is_segment=True, **how) for s, e in places]
    return MeantText(text, places, tuple(segments))


def check_prompt(token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidRequest("prompt", "must hold at least one token")
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                "prompt", f"token id {token_id} is outside the vocabulary of {vocab_size}"
            )


def _resolve_max_tokens(
    num_prompt_tokens: int,
    sampling: SamplingParams,
    config: SchedulerConfig,
    default: int | None,
) -> int:
    room = config.context_length - num_prompt_tokens
    if room < 1:
        raise config.too_long(num_prompt_tokens, sampling.max_tokens or 1)
    if sampling.max_tokens is not None:
        return sampling.max_tokens  # whether it fits is for check_fits to say, with the numbers
    max_tokens = room if default is None else min(default, room)
    if sampling.min_tokens > max_tokens:
        raise InvalidRequest(
            "min_tokens", f"{sampling.min_tokens} is more than the answer may have, {max_tokens}"
        )
    return max_tokens


def _check_choice(request: Request, vocab_size: int) -> None:
    """Refuse masks that leave nothing for the first token.

    Bad words of several tokens may do so later, which depends on what is generated.
    """
    sampling = request.sampling
    forbidden = {word[0] for word in request.bad_word_ids if len(word) == 1}
    if sampling.min_tokens > 0:
        forbidden |= request.stop_token_ids
    allowed: Collection[int] = range(vocab_size)
    field = "min_tokens" if sampling.min_tokens > 0 else "bad_words"
    if sampling.allowed_token_ids is not None:
        field, allowed = "allowed_token_ids", sampling.allowed_token_ids
    if all(token_id in forbidden for token_id in allowed):
        raise InvalidRequest(
            field,
            "no token is left to sample: bad_words, and min_tokens, which holds stop tokens back, "
            "forbid every one that is allowed",
        )


def encode_bad_words(words: Sequence[str], codec: TextCodec) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelt at the start of a text and after a space, as vLLM does."""
    encodings: dict[tuple[int, ...], None] = {}  # an ordered set
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            try:
                encodings[tuple(codec.encode(text, add_special_tokens=False))] = None
            except InvalidRequest as error:
                raise InvalidRequest("bad_words", f"{word!r:.80} {error.message}") from None
    encodings.pop((), None)
    return tuple(encodings)
