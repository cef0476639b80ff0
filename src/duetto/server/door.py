"""From a request's body to the engine's Requests: text becomes ids here, once, off the event loop.

Everything that can be refused is refused here, before the engine hears of it. Knows no HTTP.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec
from duetto.engine.intake import make_requests
from duetto.server.errors import invalid, refused
from duetto.server.protocol import (
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    Scalar,
    TokenizeRequest,
    message_dicts,
)
from duetto.server.sampling import caller_names, default_max_tokens

T = TypeVar("T")

MAX_SALT_CHARS = 128
INLINE_BYTES = 4096  # a body up to this size is tokenized at once; a thread would cost more
# Names that decide how a template is used, not what it says; a template may not be given them.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        *("messages", "conversation", "documents", "tools"),
        *("add_generation_prompt", "continue_final_message", "chat_template", "tokenize"),
        *("padding", "truncation", "return_dict", "return_tensors"),
    }
)


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str | None  # as it was sent; None if ids were sent


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, ready for the engine: choice `i` answers prompt `i // sampling.n`."""

    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of an HTTP request beside its body."""

    request_id: str  # ours, unique
    time: float  # on the engine's clock
    num_bytes: int
    tenant: bytes = b""  # digest of the API key; tenants share no KV blocks


class Door:
    def __init__(
        self, codec: TextCodec, config: SchedulerConfig, defaults: Mapping[str, Any]
    ) -> None:
        """`defaults` are the model's own sampling values."""
        self._codec = codec
        self._config = config
        self._defaults = defaults

    async def completion(
        self,
        request: CompletionRequest,
        prompts: Sequence[str | list[int]],
        sampling: SamplingParams,
        arrival: Arrival,
    ) -> Job:
        """Raises ApiError 400, naming the field."""
        add_special = request.add_special_tokens is not False

        def build() -> Job:
            encoded = [self._encode(prompt, add_special) for prompt in prompts]
            return self._job(request, encoded, sampling, arrival)

        return await _off_the_loop(build, arrival.num_bytes, bool(request.bad_words))

    async def chat(self, request: ChatRequest, sampling: SamplingParams, arrival: Arrival) -> Job:
        """Raises ApiError 400, naming the field."""
        _check_messages(request.messages, request.chat_template_kwargs)

        def build() -> Job:
            prompt = self._encode(self._render(request), request.add_special_tokens is True)
            return self._job(request, [prompt], sampling, arrival)

        return await _off_the_loop(build, arrival.num_bytes, bool(request.bad_words))

    async def tokenize(self, request: TokenizeRequest, num_bytes: int) -> list[int]:
        """Raises ApiError 400, naming the field."""
        if (request.prompt is None) == (request.messages is None):
            raise invalid("prompt", "exactly one of prompt and messages is needed")
        if request.messages is not None:
            _check_messages(request.messages, request.chat_template_kwargs)

        def build() -> list[int]:
            if request.prompt is not None:
                add_special = request.add_special_tokens is not False
                return self._codec.encode(request.prompt, add_special_tokens=add_special)
            add_special = request.add_special_tokens is True
            return self._codec.encode(self._render(request), add_special_tokens=add_special)

        return await _off_the_loop(build, num_bytes, False)

    async def detokenize(self, tokens: list[int], num_bytes: int) -> str:
        """Raises ApiError 400, naming the field."""
        for token_id in tokens:
            if not 0 <= token_id < self._codec.vocab_size:
                size = self._codec.vocab_size
                raise invalid("tokens", f"{token_id} is outside the vocabulary of {size}")

        def build() -> str:
            return self._codec.decode(tokens, skip_special_tokens=False)

        return await _off_the_loop(build, num_bytes, False)

    # --- these run on any thread ---------------------------------------------------------------

    def _encode(self, prompt: str | list[int], add_special: bool) -> Prompt:
        if isinstance(prompt, str):
            ids = self._codec.encode(prompt, add_special_tokens=add_special)
            return Prompt(tuple(ids), prompt)
        return Prompt(tuple(prompt), None)

    def _render(self, request: ChatRequest | TokenizeRequest) -> str:
        return self._codec.render_chat(
            message_dicts(request.messages or []),
            add_generation_prompt=request.add_generation_prompt is not False,
            template_kwargs=request.chat_template_kwargs or {},
        )

    def _job(
        self,
        request: SamplingRequest,
        prompts: list[Prompt],
        sampling: SamplingParams,
        arrival: Arrival,
    ) -> Job:
        salt = arrival.tenant + _checked_salt(request.cache_salt)
        priority = _checked_priority(request.priority, self._config)
        requests: list[Request] = []
        for index, prompt in enumerate(prompts):
            try:
                requests += make_requests(
                    prompt.token_ids,
                    sampling,
                    codec=self._codec,
                    config=self._config,
                    request_id=f"{arrival.request_id}-{index}",
                    arrival_time=arrival.time,
                    default_max_tokens=default_max_tokens(request, self._defaults),
                    priority=priority,
                    cache_salt=salt,
                )
            except InvalidRequest as error:
                raise refused(error, caller_names(request)) from None
        return Job(tuple(prompts), tuple(requests), sampling)


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """A prompt field's four shapes as a list of prompts. Raises ApiError 400 for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "must hold at least one prompt or token id")
    texts = [p for p in prompt if isinstance(p, str)]
    token_ids = [p for p in prompt if isinstance(p, int)]
    id_lists = [p for p in prompt if isinstance(p, list)]
    if token_ids and len(token_ids) == len(prompt):
        return [token_ids]
    if len(texts) == len(prompt):
        return [*texts]
    if len(id_lists) == len(prompt):
        return [*id_lists]
    raise invalid("prompt", "must be a text, texts, token ids or lists of token ids, not a mixture")


def _check_messages(
    messages: Sequence[object] | None, template_kwargs: dict[str, Scalar] | None
) -> None:
    if not messages:
        raise invalid("messages", "must hold at least one message")
    for name in RESERVED_TEMPLATE_KWARGS.intersection(template_kwargs or ()):
        raise invalid("chat_template_kwargs", f"{name} may not be given to a template")


def _checked_salt(salt: str | None) -> bytes:
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise invalid("cache_salt", f"must be of 1 to {MAX_SALT_CHARS} characters")
    return b"" if salt is None else salt.encode()


def _checked_priority(priority: int | None, config: SchedulerConfig) -> int:
    if priority and config.scheduling_policy != "priority":
        raise invalid("priority", "needs a server started with --scheduling-policy priority")
    if priority is not None and abs(priority) > 2**31:
        raise invalid("priority", "must be from -2**31 to 2**31")
    return priority or 0


async def _off_the_loop(build: Callable[[], T], num_bytes: int, is_costly: bool) -> T:
    """Long work goes to a thread, so that no other stream stutters while a text is tokenized."""
    if num_bytes <= INLINE_BYTES and not is_costly:
        return build()
    return await asyncio.to_thread(build)
