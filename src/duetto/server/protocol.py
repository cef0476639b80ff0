"""The bodies that clients send, as strict structs, and the reading of them.

A field that this version cannot honour is declared with the type `None`: null is accepted, anything
else is refused by name. Knows no tokens and no engine; ranges are SamplingParams' to check.
"""

import re
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from duetto.server.body import check_structure
from duetto.server.errors import ApiError, invalid

T = TypeVar("T")
Role = Literal["system", "developer", "user", "assistant"]
ServiceTier = Literal["auto", "default"]
MAX_MESSAGES = 5000  # and parts of one; beyond, a body costs more to read than a model would take
MAX_DETOKENIZED = 2**20


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]


class SamplingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints that sample have in common; the names are OpenAI's, then vLLM's."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    response_format: ResponseFormat | None = None
    # Labels for the caller's own books; by definition they change nothing.
    user: str | None = None
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=16)] | None = None
    # Known to clients, not in this version.
    chat_template: None = None
    documents: None = None
    guided_choice: None = None
    guided_grammar: None = None
    guided_json: None = None
    guided_regex: None = None
    kv_transfer_params: None = None
    length_penalty: None = None
    structured_outputs: None = None
    truncate_prompt_tokens: None = None
    use_beam_search: None = None


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    role: Role
    content: str | Annotated[list[TextPart], msgspec.Meta(max_length=MAX_MESSAGES)]
    name: str | None = None
    # What the openai package writes into an assistant's message that is sent back.
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None


Messages = Annotated[list[Message], msgspec.Meta(max_length=MAX_MESSAGES)]


class ChatRequest(SamplingRequest, kw_only=True):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: ServiceTier | None = None
    tool_choice: Literal["none"] | None = None
    audio: None = None
    continue_final_message: None = None
    function_call: None = None
    functions: None = None
    modalities: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    reasoning_effort: None = None
    tools: None = None
    verbosity: None = None
    web_search_options: None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: None = None
    continue_final_message: None = None
    tools: None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    tokens: Annotated[list[int], msgspec.Meta(max_length=MAX_DETOKENIZED)]
    model: str | None = None


_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$|$)", re.DOTALL)
_VALUE = re.compile(r"Invalid enum value (.*)", re.DOTALL)
# What is accepted where only some values are, by the name of the field.
_CHOICES = {
    "best_of": ("1",),
    "role": get_args(Role),
    "service_tier": get_args(ServiceTier),
    "tool_choice": ("none",),
    "type": ("text",),
}
_PLACE = re.compile(r"\(byte ([0-9]+)\)")
_NOT_A_NUMBER = re.compile(rb'"(\w+)"\s*:\s*-?(?:nan|infinity)', re.IGNORECASE)
_MISSING = re.compile(r"Object missing required field `(.*?)`(?: - at `\$|$)", re.DOTALL)


def decode(body: bytes, into: type[T]) -> T:
    """Read a body, or raise a 400 that names the field at fault. Runs on any thread."""
    check_structure(body)
    try:
        return msgspec.json.decode(body, type=into)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(body, str(error)) from None
    except RecursionError:
        raise invalid(None, "the body is nested too deeply") from None


def _malformed(body: bytes, message: str) -> ApiError:
    """JSON has no NaN and no Infinity, but Python's json module writes them."""
    if place := _PLACE.search(message):
        at = int(place.group(1))
        named = _NOT_A_NUMBER.search(body[max(0, at - 100) : at + 9])
        if named:
            return invalid(named.group(1).decode(), "NaN and Infinity are no JSON numbers")
    return invalid(None, "the body is not valid JSON in UTF-8")


def _explain(message: str) -> ApiError:
    """Turn msgspec's "Expected `int`, got `str` - at `$.n`" into a field and a reason."""
    found = _PATH.search(message)
    path = found.group(1) if found else ""
    reason = message[: found.start()] if found else message
    for pattern, words in ((_UNKNOWN, "is not a known field"), (_MISSING, "is required")):
        if named := pattern.match(message):
            field = named.group(1)[:200]
            return invalid(f"{path}.{field}" if path else field, words)
    if reason.startswith("Expected `null`"):
        reason = "is not supported in this version"
    elif named := _VALUE.match(reason):
        reason = f"{named.group(1)[:200]} is not supported in this version"
        if choices := _CHOICES.get(path.rpartition(".")[2]):
            reason += f"; accepted: {', '.join(choices)}"
    reason = reason.replace("`", "")
    return invalid(path or None, reason if path else f"the body: {reason}")
