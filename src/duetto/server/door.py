"""From a request's body to the engine's Requests: text becomes ids here, once, off the event loop.

Everything that can be refused is refused here, before the engine hears of it. Knows no HTTP.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request, fan_out
from duetto.core.reuse import TokenRange
from duetto.core.reuse_choice import ReuseAsked, ReuseChoice
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar, GrammarMaker
from duetto.core.text import TextCodec
from duetto.dialects.pieces import AnswerParser
from duetto.engine.infill import NO_TOKENS, Infill
from duetto.engine.intake import encode_bad_words, make_request
from duetto.engine.marked_chat import RenderedChat
from duetto.engine.segments import PromptSegment, SegmentedIds, encode_segments
from duetto.engine.speech import Speech
from duetto.server.apis.asked import Asked, AskedChat, AskedMiddle, AskedPrompts, ChatPrompt
from duetto.server.apis.chat import chat_prompt, check_text_or_chat
from duetto.server.apis.echo import Echo, echo_of_ids, echo_of_text
from duetto.server.apis.prompts import GivenPrompt
from duetto.server.apis.protocol import TokenizeRequest
from duetto.server.apis.reply_size import ReplySize, too_large
from duetto.server.http.errors import invalid, refused
from duetto.server.http.text_work import TextWork
from duetto.server.rendering import render
from duetto.server.settings import ServerSettings

MAX_SALT_CHARS = 128
MESSAGES = {"prompt": "messages"}


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    token_ids: tuple[int, ...]
    text: str | None  # as it was sent; None if ids or segments were sent, or a part was cut off
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
    make_parser: Callable[[], AnswerParser] | None = None  # of each answer; None: it is all content


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
        grammars: GrammarMaker | None = None,
        speech: Speech = Speech(),  # noqa: B008  # frozen
    ) -> None:
        """`clock` must be the engine's own; without `grammars` no answer can be constrained."""
        self._speech = speech
        self._work = work
        self._codec = codec
        self._config = config
        self._reuse = settings.reuse
        self._max_reply_bytes = settings.max_reply_bytes
        self._seed = settings.seed
        self._clock = clock
        self._grammars = grammars
        self._num_accepted = 0  # prompts
        self._infill = Infill.of(codec)

    async def draft(self, asked: AskedChat | AskedPrompts, arrival: RequestHead) -> Job:
        """A job that has not arrived yet. Raises ApiError 400, naming the field."""
        if isinstance(asked, AskedPrompts):
            return await self._completion(asked, arrival)
        return await self._chat(asked, arrival)

    async def _completion(self, asked: AskedPrompts, arrival: RequestHead) -> Job:
        choice = self._choice(asked.asked)

        def build() -> Job:
            if asked.middle is not None:
                return self._draft_middles(asked, asked.middle, arrival)
            encoded = [
                self._encode(asked.asked, prompt, choice, add_special=asked.add_special_tokens)
                for prompt in asked.prompts
            ]
            job = self._draft(asked.asked, encoded, arrival)
            if not asked.echo:
                return job
            return replace(job, prompts=tuple([self._with_echo(asked, p) for p in job.prompts]))

        # Each of these may take long whatever the body's size is.
        sampling = asked.asked.sampling
        at_once = not (sampling.bad_words or sampling.structured_outputs or asked.echo)
        at_once = at_once and asked.middle is None
        return await self._work.text(build, arrival.num_bytes, at_once=at_once)

    async def _chat(self, conversation: AskedChat, arrival: RequestHead) -> Job:
        asked, add_special = conversation.asked, conversation.prompt.add_special_tokens
        choice = self._choice(asked)

        def build() -> Job:
            with _naming(asked.names):
                chat = self._render(conversation.prompt)
                plan = self._speech.plan(
                    conversation.tools,
                    chat.text,
                    asked.sampling,
                    reads_reasoning=conversation.reads_reasoning,
                    tenant=arrival.tenant,
                )
            given, why = chat.segments or chat.text, chat.refusal
            prompt = self._encode(asked, given, choice, add_special=add_special, refusal=why)
            planned = replace(asked, sampling=plan.sampling)
            job = self._draft(planned, [prompt], arrival, plan.grammar)
            return replace(job, make_parser=plan.make_parser)

        return await self._work.chat(build, arrival.num_bytes)

    async def tokenize(self, request: TokenizeRequest, num_bytes: int) -> SegmentedIds:
        """The ids, and where what is marked as reusable stands. Raises ApiError 400, naming the
        field."""
        check_text_or_chat(request)
        if (text := request.prompt) is not None:
            add_special = request.add_special_tokens is not False
            encode = partial(self._ids, text, add_special=add_special)
            return await self._work.text(encode, num_bytes)
        return await self.tokenize_chat(chat_prompt(request), num_bytes)

    async def tokenize_chat(
        self, prompt: ChatPrompt, num_bytes: int, names: Mapping[str, str] = MESSAGES
    ) -> SegmentedIds:
        """Raises ApiError 400, naming the field in the caller's words."""

        def build() -> SegmentedIds:
            with _naming(names):
                chat = self._render(prompt)
                given = chat.segments or chat.text
                return self._ids(given, add_special=prompt.add_special_tokens)

        return await self._work.chat(build, num_bytes)

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

    def accept(self, draft: Job) -> Job:
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

    def _render(self, prompt: ChatPrompt) -> RenderedChat:
        reasons = self._speech.dialects.reasoning is not None
        return render(self._codec, prompt, always_reasons=reasons)

    def _choice(self, asked: Asked) -> ReuseChoice | None:
        with _naming({}):
            return self._reuse.chosen(asked.reuse)

    def _draft_middles(self, asked: AskedPrompts, middle: AskedMiddle, arrival: RequestHead) -> Job:
        infill = self._infill
        if infill is None:
            raise invalid(middle.field, NO_TOKENS)
        texts = [middle.suffix, *(text for file in middle.files for text in file)]
        behind = sum([self._fewest_tokens(text) for text in texts])
        encoded = []
        for prompt in asked.prompts:
            assert not isinstance(prompt, tuple), "segments with a suffix"
            num_tokens = self._fewest_tokens(prompt) + behind
            if num_tokens > self._config.context_length:
                max_tokens = asked.asked.sampling.max_tokens or 1
                error = self._config.too_long(num_tokens, max_tokens, is_lower_bound=True)
                raise refused(error, asked.asked.names)
            with _naming(asked.asked.names):
                ids = infill.prompt(
                    prompt,
                    middle.suffix,
                    files=middle.files,
                    add_special_tokens=asked.add_special_tokens,
                )
            encoded.append(EncodedPrompt(tuple(ids), None))
        return self._draft(asked.asked, encoded, arrival, ends=infill.end_token_ids)

    def _reuse_asked(
        self,
        asked: Asked,
        choice: ReuseChoice | None,
        segments: tuple[TokenRange, ...],
        refusal: InvalidRequest | None,
    ) -> ReuseAsked | None:
        """What is asked for a prompt; None where nobody asks for anything."""
        has_marks = bool(segments) or refusal is not None
        if choice is None or not (has_marks or asked.reuse is not None):
            return None
        if segments and asked.scored_by is not None:
            why = "with reuse: it needs the prompt's own, exact KV"
            refusal = InvalidRequest(asked.scored_by, why)
        return self._reuse.asked(choice, segments, refusal)

    def _encode(
        self,
        asked: Asked,
        prompt: GivenPrompt,
        choice: ReuseChoice | None,
        *,
        add_special: bool,
        refusal: InvalidRequest | None = None,
    ) -> EncodedPrompt:
        """`refusal`: why what is marked in the prompt has no place of its own."""
        most_kept = self._most_kept(asked)
        num_tokens = 0 if most_kept else self._fewest_tokens(prompt)
        if num_tokens > self._config.context_length:
            max_tokens, is_bound = asked.sampling.max_tokens or 1, not isinstance(prompt, list)
            error = self._config.too_long(num_tokens, max_tokens, is_lower_bound=is_bound)
            raise refused(error, asked.names)
        if isinstance(prompt, list):
            ids, ranges = tuple(prompt), tuple[TokenRange, ...]()
        else:
            with _naming(asked.names):
                ids, ranges = self._ids(prompt, add_special=add_special)
        if most_kept and (ranges or refusal is not None):
            raise invalid("truncate_prompt_tokens", "texts marked as reusable must stay whole")
        reuse = self._reuse_asked(asked, choice, ranges, refusal)
        if most_kept and len(ids) > most_kept:
            return EncodedPrompt(ids[-most_kept:], None, reuse)
        return EncodedPrompt(ids, prompt if isinstance(prompt, str) else None, reuse)

    def _most_kept(self, asked: Asked) -> int | None:
        """Tokens that a prompt is cut to, from its end; None if it is not to be cut."""
        if asked.truncate_prompt_tokens != -1:
            return asked.truncate_prompt_tokens
        num_output = asked.sampling.max_tokens or asked.default_max_tokens or 1
        return max(1, self._config.context_length - num_output)

    def _ids(self, prompt: str | tuple[PromptSegment, ...], *, add_special: bool) -> SegmentedIds:
        if isinstance(prompt, str):
            ids = self._codec.encode(prompt, add_special_tokens=add_special)
            return SegmentedIds(tuple(ids), ())
        return encode_segments(self._codec, prompt, add_special_tokens=add_special)

    def _with_echo(self, asked: AskedPrompts, prompt: EncodedPrompt) -> EncodedPrompt:
        with _naming({}):
            if prompt.text is None:
                ids = prompt.token_ids
                echo = echo_of_ids(self._codec, ids, with_tokens=asked.echo_tokens)
            else:
                echo = echo_of_text(
                    self._codec,
                    prompt.text,
                    add_special_tokens=asked.add_special_tokens,
                    with_tokens=asked.echo_tokens,
                )
        return replace(prompt, echo=echo)

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

    def _draft(
        self,
        asked: Asked,
        prompts: list[EncodedPrompt],
        arrival: RequestHead,
        grammar: Grammar | None = None,
        ends: frozenset[int] = frozenset(),
    ) -> Job:
        """One request per prompt; what depends on the order of requests is still missing.

        `grammar` is of calls; without one it is that of the structured outputs."""
        with _naming(asked.names):
            most = self._config.max_logprobs
            sampling = asked.sampling.with_logprobs(self._codec.vocab_size, most)
        asked = replace(asked, sampling=sampling)
        salt = arrival.tenant + checked_salt(asked.cache_salt)
        size = ReplySize.of(asked, self._max_reply_bytes)
        # What nobody asked for must not be the reason to refuse.
        limits = asked.default_max_tokens, size.room(len(prompt.token_ids) for prompt in prompts)
        with _naming(asked.names):
            self._config.check_priority(asked.priority)
            bad_word_ids = encode_bad_words(sampling.bad_words, self._codec)
            grammar = grammar or self._grammar(sampling, arrival.tenant)
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
                    priority=asked.priority,
                    cache_salt=salt,
                    tenant=arrival.client,
                    reuse=prompt.reuse,
                    grammar=grammar,
                    end_token_ids=ends,
                )
                for index, prompt in enumerate(prompts)
            ]
        num_bytes = size.num_bytes((r.num_prompt_tokens, r.max_tokens) for r in requests)
        if num_bytes > size.max_bytes:
            num_scored = sum(r.num_prompt_tokens for r in requests)
            raise too_large(asked, size, num_bytes, num_scored)
        return Job(tuple(prompts), tuple(requests), sampling, size, num_bytes)

    def _grammar(self, sampling: SamplingParams, tenant: bytes) -> Grammar | None:
        asked = sampling.structured_outputs
        if asked is None or self._grammars is None:
            return None  # make_request refuses
        return self._grammars.make(asked, tenant)


@contextmanager
def _naming(names: Mapping[str, str]) -> Iterator[None]:
    """What the codec or the engine's checks refuse within it is a 400 in the caller's names."""
    try:
        yield
    except InvalidRequest as error:
        raise refused(error, names) from None


def checked_salt(salt: str | None) -> bytes:
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise invalid("cache_salt", f"must be of 1 to {MAX_SALT_CHARS} characters")
    return b"" if salt is None else salt.encode()
