"""From a body to what it asks of sampling. Knows the field names of both sides and no tokens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import StructuredOutputsParams
from duetto.server.apis.asked import Asked, AskedMiddle
from duetto.server.apis.protocol import (
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    SegmentedPrompt,
    StreamOptions,
)
from duetto.server.apis.structured import Schema, constraint_names, structured_outputs
from duetto.server.http.errors import invalid, refused

MAX_STEP_ENTRIES = 2**20  # about 0.1 s, and six times the largest vocabularies
COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat may use all the room there is

_SAME_NAME = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "seed",
    "prompt_logprobs",
    "skip_special_tokens",
)


def completion_asked(request: CompletionRequest, defaults: Mapping[str, Any]) -> Asked:
    """Raises ApiError 400, naming the caller's field. `defaults` are the model's own."""
    asked = {**defaults, "max_tokens": None, **_given(request)}
    asked["logprobs"] = request.logprobs
    if request.best_of not in (None, request.n or 1):
        raise invalid("best_of", "is not supported in this version; accepted: the value of n")
    if request.echo and request.max_tokens == 0:
        # Scoring a prompt: the one token that the engine has to sample is not shown.
        asked["max_tokens"] = 1
    if request.echo and request.logprobs is not None:
        if request.prompt_logprobs is not None:
            raise invalid("prompt_logprobs", "echo with logprobs already scores the prompt")
        if request.stream and (request.n or 1) > 1:
            raise invalid("n", "must be 1 where echo with logprobs is streamed")
        asked["prompt_logprobs"] = request.logprobs
    usual = defaults.get("max_tokens", COMPLETION_MAX_TOKENS)
    return replace(_asked(request, asked, {}), default_max_tokens=usual, is_scored_by_choice=True)


def middle_of(request: CompletionRequest) -> AskedMiddle | None:
    """What `suffix` asks. Raises ApiError 400 for what does not go with it."""
    if not request.suffix:
        return None
    prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
    others = {
        "echo": request.echo,
        "reuse": request.reuse,
        "truncate_prompt_tokens": request.truncate_prompt_tokens,
        "prompt.segments": any(isinstance(each, SegmentedPrompt) for each in prompts),
    }
    for name, value in others.items():
        if value:
            raise invalid(name, "does not go with suffix; leave one of the two out")
    return AskedMiddle(suffix=request.suffix)


def chat_asked(request: ChatRequest, defaults: Mapping[str, Any]) -> Asked:
    """Raises ApiError 400, naming the caller's field. `defaults` are the model's own."""
    asked = {**defaults, "max_tokens": None, **_given(request)}
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise invalid("max_tokens", "differs from max_completion_tokens, its newer name")
        asked["max_tokens"] = request.max_completion_tokens
    if request.logprobs:
        asked["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
    if request.thinking_token_budget not in (None, -1):
        if request.thinking_budget not in (None, request.thinking_token_budget):
            raise invalid("thinking_budget", "differs from thinking_token_budget, its other name")
        asked["thinking_budget"] = request.thinking_token_budget
        names["thinking_budget"] = "thinking_token_budget"
    elif request.thinking_budget is not None:
        asked["thinking_budget"] = request.thinking_budget
    if request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return replace(_asked(request, asked, names), default_max_tokens=defaults.get("max_tokens"))


def check_lists(request: SamplingRequest, vocab_size: int) -> None:
    """Refuse lists of token ids that no vocabulary fills, before each entry is looked at."""
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        count = len(getattr(request, name) or ())
        if count > vocab_size:
            raise invalid(name, f"{count} entries are more than the vocabulary of {vocab_size}")


def check_step_entries(sampling: SamplingParams, num_running: int) -> None:
    """Refuse lists that would make each step long: every answer that runs looks at its own.

    Raises ApiError 400, naming the longest list, with the numbers.
    """
    sizes = {
        "logit_bias": len(sampling.logit_bias),
        "allowed_token_ids": len(sampling.allowed_token_ids or ()),
        "stop_token_ids": len(sampling.stop_token_ids) if sampling.min_tokens else 0,
    }
    if num_running * sum(sizes.values()) > MAX_STEP_ENTRIES:
        field = max(sizes, key=lambda name: sizes[name])
        raise invalid(
            field,
            f"{sum(sizes.values())} entries of {', '.join(sizes)} for each of {num_running} "
            f"answers are too much work in a step; at most {MAX_STEP_ENTRIES} together",
        )


def _scored_by(request: SamplingRequest) -> str | None:
    """The field that asks for log-probabilities of the prompt; None if none does."""
    if request.prompt_logprobs is not None:
        return "prompt_logprobs"
    if not isinstance(request, CompletionRequest) or not request.echo:
        return None
    return None if request.logprobs is None else "echo"


def _given(request: SamplingRequest) -> dict[str, Any]:
    values = ((name, getattr(request, name)) for name in _SAME_NAME)
    given = {name: value for name, value in values if value is not None}
    if given.get("stop") == "":  # no stop string; a list that holds one is a mistake
        del given["stop"]
    return given


def _asked(request: SamplingRequest, params: dict[str, Any], names: Mapping[str, str]) -> Asked:
    options = request.stream_options or StreamOptions()
    if (options.include_usage or options.continuous_usage_stats) and not request.stream:
        raise invalid("stream_options", "needs stream to be true")
    if request.stream and request.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "cannot be streamed")
    if (kept := request.truncate_prompt_tokens) is not None and kept < 1 and kept != -1:
        raise invalid("truncate_prompt_tokens", "must be 1 or more, or -1 for what fits")
    if request.store:
        raise invalid("store", "nothing is stored by this server; only false is accepted")
    params["structured_outputs"] = structured_outputs(request)
    names = {**names, **constraint_names(request)}
    try:
        sampling = SamplingParams(**params)
    except InvalidRequest as error:
        raise refused(error, names) from None
    return Asked(
        sampling=sampling,
        stream=bool(request.stream),
        cache_salt=request.cache_salt,
        priority=request.priority or 0,
        reuse=request.reuse,
        truncate_prompt_tokens=kept,
        scored_by=_scored_by(request),
        names=names,
    )


def json_object_output() -> StructuredOutputsParams:
    return StructuredOutputsParams(json_object=True)


def json_schema_output(schema: Schema, field: str) -> StructuredOutputsParams:
    """Raises ApiError 400, naming `field`."""
    try:
        return StructuredOutputsParams(json=schema)
    except InvalidRequest as error:
        raise invalid(field, error.message) from None
