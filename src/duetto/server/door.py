"""From a request's body to the engine's Requests: text becomes ids here, once, off the event loop.

Everything that can be refused is refused here, before the engine hears of it. Knows no HTTP.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request, fan_out
from duetto.core.reuse import TokenRange
from duetto.core.reuse_choice import ReuseAsked, ReuseChoice
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec
from duetto.engine.intake import encode_bad_words, make_request
from duetto.engine.marked_chat import Conversation, RenderedChat, render_marked
from duetto.engine.segments import PromptSegment, SegmentedIds, encode_segments
from duetto.server.apis.echo import Echo, echo_of_ids, echo_of_text
from duetto.server.apis.prompts import GivenPrompt
from duetto.server.apis.protocol import (
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    TokenizeRequest,
)
from duetto.server.apis.reply_size import ReplySize, too_large
from duetto.server.apis.sampling import caller_names, default_max_tokens, scores_the_prompt
from duetto.server.http.errors import invalid, refused
from duetto.server.http.text_work import TextWork
from duetto.server.settings import ServerSettings

MAX_SALT_CHARS = 128
_THINKING = ("enable_thinking", "thinking")  # what templates call the switch


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    token_ids: tuple[int, ...]
    text: str | None  # as it was sent; None if ids or segments were sent
    reuse: ReuseAsked | None = None
    echo: Echo | None = None  # only if asked for


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, ready for the engine: choice `i` answers prompt `i // sampling.n`."""

    prompts: tuple[EncodedPrompt, ...]
    requests: tuple[Request, ...]
    sampling: SamplingParams
    size: ReplySize
    reply_bytes: int  # that the reply could take, if it is not streamed


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What is known of an HTTP request beside its body."""

    request_id: str  # ours, unique
    num_bytes: int
    tenant: bytes = b""  # digest of the API key; tenants share no KV blocks
    name: str = ""  # what the client knows the reply by: its own label, or our id
    client: bytes = b""  # who takes turns with others: a key or an address (places.py)


class Door:
    def __init__(
        self,
        codec: TextCodec,
        config: SchedulerConfig,
        settings: ServerSettings,
        work: TextWork,
        clock: Callable[[], float],
    ) -> None:
        """`clock` must be the engine's own."""
        self._work = work
        self._codec = codec
        self._config = config
        self._defaults = settings.default_sampling
        self._reuse = settings.reuse
        self._max_reply_bytes = settings.max_reply_bytes
        self._seed = settings.seed
        self._clock = clock
        self._num_accepted = 0  # prompts

    def check_lists(self, request: SamplingRequest) -> None:
        """Refuse lists of token ids that no vocabulary fills, before each entry is looked at."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            count, most = len(getattr(request, name) or ()), self._codec.vocab_size
            if count > most:
                raise invalid(name, f"{count} entries are more than the vocabulary of {most}")

    async def completion(
        self,
        request: CompletionRequest,
        prompts: Sequence[GivenPrompt],
        sampling: SamplingParams,
        arrival: RequestHead,
    ) -> Job:
        """Raises ApiError 400, naming the field."""
        add_special = request.add_special_tokens is not False
        choice = self._choice(request)

        def build() -> Job:
            encoded = [
                self._encode(request, prompt, sampling, choice, add_special=add_special)
                for prompt in prompts
            ]
            job = self._draft(request, encoded, sampling, arrival)
            return self._with_echoes(request, job, add_special) if request.echo else job

        at_once = not request.bad_words and not request.echo
        return self._accept(await self._work.text(build, arrival.num_bytes, at_once=at_once))

    async def chat(
        self, request: ChatRequest, sampling: SamplingParams, arrival: RequestHead
    ) -> Job:
        """Raises ApiError 400, naming the field."""
        choice = self._choice(request)

        def build() -> Job:
            chat = self._render(request)
            prompt = self._encode(
                request,
                chat.segments or chat.text,
                sampling,
                choice,
                add_special=request.add_special_tokens is True,
                refusal=chat.refusal,
            )
            return self._draft(request, [prompt], sampling, arrival)

        return self._accept(await self._work.chat(build, arrival.num_bytes))

    async def tokenize(self, request: TokenizeRequest, num_bytes: int) -> list[int]:
        """Raises ApiError 400, naming the field."""
        if (request.prompt is None) == (request.messages is None):
            field = "prompt" if request.prompt is None else "messages"
            raise invalid(field, "exactly one of prompt and messages is needed")
        templated = {
            "chat_template_kwargs": bool(request.chat_template_kwargs),
            "add_generation_prompt": request.add_generation_prompt is False,
            "reasoning_effort": request.reasoning_effort not in (None, "none"),
            "documents": bool(request.documents),
        }
        for name, is_asked in templated.items():
            if request.prompt is not None and is_asked:
                raise invalid(name, "is for messages; a prompt has no template")

        def build() -> list[int]:
            if request.prompt is not None:
                add_special = request.add_special_tokens is not False
                return self._codec.encode(request.prompt, add_special_tokens=add_special)
            add_special = request.add_special_tokens is True
            with _naming({"prompt": "messages"}):
                chat = self._render(request)
                return [*self._ids(chat.segments or chat.text, add_special=add_special).token_ids]

        if request.messages is not None:
            return await self._work.chat(build, num_bytes)
        return await self._work.text(build, num_bytes)

    async def detokenize(self, tokens: list[int], num_bytes: int) -> str:
        """Raises ApiError 400, naming the field."""
        size = self._codec.vocab_size

        def build() -> str:
            for token_id in tokens:  # min and max hold the interpreter for as long as they take
                if not 0 <= token_id < size:
                    raise invalid("tokens", f"{token_id} is outside the vocabulary of {size}")
            with _naming({"prompt": "tokens"}):
                return self._codec.decode(tokens, skip_special_tokens=False)

        return await self._work.text(build, num_bytes)

    def _accept(self, draft: Job) -> Job:
        """Nothing can be refused any more, so the requests arrive, and get their seeds in order."""
        now = self._clock()
        requests: list[Request] = []
        for request in draft.requests:
            seed = request.seed
            if self._seed is not None and draft.sampling.seed is None:
                seed = self._seed + self._num_accepted
            self._num_accepted += 1
            requests += fan_out(replace(request, arrival_time=now, seed=seed))
        return replace(draft, requests=tuple(requests))

    # --- these run on any thread ---------------------------------------------------------------

    def _choice(self, request: SamplingRequest) -> ReuseChoice | None:
        with _naming({}):
            return self._reuse.chosen(request.reuse)

    def _asked(
        self,
        request: SamplingRequest,
        choice: ReuseChoice | None,
        segments: tuple[TokenRange, ...],
        refusal: InvalidRequest | None,
    ) -> ReuseAsked | None:
        """What is asked for a prompt; None where nobody asks for anything."""
        has_marks = bool(segments) or refusal is not None
        if choice is None or not (has_marks or request.reuse is not None):
            return None
        if segments and (field := scores_the_prompt(request)) is not None:
            refusal = InvalidRequest(field, "with reuse: it needs the prompt's own, exact KV")
        return self._reuse.asked(choice, segments, refusal)

    def _encode(
        self,
        request: SamplingRequest,
        prompt: GivenPrompt,
        sampling: SamplingParams,
        choice: ReuseChoice | None,
        *,
        add_special: bool,
        refusal: InvalidRequest | None = None,
    ) -> EncodedPrompt:
        """`refusal`: why what is marked in the prompt has no place of its own."""
        num_tokens = self._fewest_tokens(prompt)
        if num_tokens > self._config.context_length:
            error = self._config.too_long(
                num_tokens, sampling.max_tokens or 1, is_lower_bound=not isinstance(prompt, list)
            )
            raise refused(error, caller_names(request))
        if isinstance(prompt, list):
            ids, ranges = tuple(prompt), tuple[TokenRange, ...]()
        else:
            with _naming(caller_names(request)):
                ids, ranges = self._ids(prompt, add_special=add_special)
        asked = self._asked(request, choice, ranges, refusal)
        return EncodedPrompt(ids, prompt if isinstance(prompt, str) else None, asked)

    def _ids(self, prompt: str | tuple[PromptSegment, ...], *, add_special: bool) -> SegmentedIds:
        if isinstance(prompt, str):
            ids = self._codec.encode(prompt, add_special_tokens=add_special)
            return SegmentedIds(tuple(ids), ())
        return encode_segments(self._codec, prompt, add_special_tokens=add_special)

    def _with_echoes(self, request: CompletionRequest, job: Job, add_special: bool) -> Job:
        prompts = []
        for prompt in job.prompts:
            with _naming({}):
                prompts.append(replace(prompt, echo=self._echo(request, prompt, add_special)))
        return replace(job, prompts=tuple(prompts))

    def _echo(self, request: CompletionRequest, prompt: EncodedPrompt, add_special: bool) -> Echo:
        with_tokens = request.logprobs is not None
        if prompt.text is None:
            return echo_of_ids(self._codec, prompt.token_ids, with_tokens=with_tokens)
        return echo_of_text(
            self._codec, prompt.text, add_special_tokens=add_special, with_tokens=with_tokens
        )

    def _fewest_tokens(self, prompt: GivenPrompt) -> int:
        """How many tokens a prompt is at least, told without tokenizing."""
        if isinstance(prompt, list):
            return len(prompt)
        if isinstance(prompt, tuple):
            contents = (segment.content for segment in prompt)
            return sum([self._fewest_tokens(c if isinstance(c, str) else [*c]) for c in contents])
        longest = self._codec.max_token_bytes
        # What is not text (half a surrogate pair) is for the tokenizer to refuse.
        return 0 if longest is None else -(-len(prompt.encode(errors="ignore")) // longest)

    def _render(self, request: ChatRequest | TokenizeRequest) -> RenderedChat:
        first_error: InvalidRequest | None = None
        for given in _without_idle(request.chat_template_kwargs or {}):
            try:
                return self._render_with(given, request)
            except InvalidRequest as error:
                if error.field != "chat_template_kwargs":
                    raise
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _render_with(
        self, given: Mapping[str, Any], request: ChatRequest | TokenizeRequest
    ) -> RenderedChat:
        messages = [message.shown() for message in request.messages or ()]
        effort = request.reasoning_effort

        def render(more: dict[str, Any]) -> RenderedChat:
            def render_chat(conversation: Conversation, documents: Conversation) -> str:
                return self._codec.render_chat(
                    conversation,
                    add_generation_prompt=request.add_generation_prompt is not False,
                    template_kwargs={**more, **given},
                    documents=documents,
                )

            return render_marked(render_chat, messages, request.documents or ())

        for more in _template_words(effort):
            try:
                return render(more)
            except InvalidRequest as error:
                if error.field != "chat_template_kwargs" and effort != "none":
                    raise
        text = render({})
        if effort not in (None, "none"):
            words = "the template of this model has no levels of it; only none is accepted"
            raise invalid("reasoning_effort", words)
        return text

    def _draft(
        self,
        request: SamplingRequest,
        prompts: list[EncodedPrompt],
        sampling: SamplingParams,
        arrival: RequestHead,
    ) -> Job:
        """One request per prompt; what depends on the order of requests is still missing."""
        salt = arrival.tenant + checked_salt(request.cache_salt)
        priority = request.priority or 0
        size = ReplySize.of(request, sampling, self._max_reply_bytes)
        # What nobody asked for must not be the reason to refuse.
        limits = (
            default_max_tokens(request, self._defaults),
            size.room(len(prompt.token_ids) for prompt in prompts),
        )
        with _naming(caller_names(request)):
            self._config.check_priority(priority)
            bad_word_ids = encode_bad_words(sampling.bad_words, self._codec)
            requests = [
                make_request(
                    prompt.token_ids,
                    sampling,
                    codec=self._codec,
                    config=self._config,
                    request_id=f"{arrival.request_id}-{index}",
                    arrival_time=0.0,
                    default_max_tokens=min((m for m in limits if m is not None), default=None),
                    bad_word_ids=bad_word_ids,
                    priority=priority,
                    cache_salt=salt,
                    tenant=arrival.client,
                    reuse=prompt.reuse,
                )
                for index, prompt in enumerate(prompts)
            ]
        num_bytes = size.num_bytes((r.num_prompt_tokens, r.max_tokens) for r in requests)
        if num_bytes > size.max_bytes:
            num_scored = sum(r.num_prompt_tokens for r in requests)
            raise too_large(request, sampling, size, num_bytes, num_scored)
        return Job(tuple(prompts), tuple(requests), sampling, size, num_bytes)


@contextmanager
def _naming(names: dict[str, str]) -> Iterator[None]:
    """What the codec or the engine's checks refuse within it is a 400 in the caller's names."""
    try:
        yield
    except InvalidRequest as error:
        raise refused(error, names) from None


def _template_words(effort: str | None) -> tuple[dict[str, Any], ...]:
    """How templates are told how much to reason, as they may read it: no two agree."""
    if effort is None:
        return ()
    if effort == "none":
        off = tuple({name: False} for name in _THINKING)
        return (*off, {"reasoning_effort": "none"})
    return ({"reasoning_effort": effort},)


def _without_idle(given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The arguments for a template, then without those that turn off what it may not have."""
    idle = [name for name in _THINKING if given.get(name) is False]
    for count in range(len(idle) + 1):
        for left_out in combinations(idle, count):
            yield {name: value for name, value in given.items() if name not in left_out}


def checked_salt(salt: str | None) -> bytes:
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise invalid("cache_salt", f"must be of 1 to {MAX_SALT_CHARS} characters")
    return b"" if salt is None else salt.encode()
