"""What the offline door returns. Names and shapes are vLLM's."""

from dataclasses import dataclass, field
from typing import Any

from duetto.core.timings import RequestTimings


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer to one prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # per token: token id -> Logprob
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why finish_reason is "error"
    # Of a chat, as conversations take it: tool_calls and reasoning_content are apart from content.
    message: dict[str, Any] | None = None
    timings: RequestTimings | None = None


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The embedding of one text."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = False
    num_cached_tokens: int = 0
    error: str | None = None  # why there is none
    timings: RequestTimings | None = None


@dataclass(slots=True)
class RequestOutput:
    """All answers to one prompt, as far as they have come."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # None for the first token
    finished: bool = False
    num_cached_tokens: int = 0
