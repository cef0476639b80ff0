"""The meeting point of the engine's updates and one HTTP request that waits for them.

Updates that come while a client takes nothing are merged, and counted as what they weigh: so a slow
client costs bounded memory and never makes the engine wait. What comes while only the event loop is
behind can still be told apart by steps, since clients measure the gaps between chunks. Lives on the
event loop; knows no HTTP and no engine.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from duetto.core.batch import RequestUpdate, SampledToken, TokenLogprob
from duetto.core.request import Request

TOKEN_BYTES = 128  # what a token weighs while it waits, on CPython 3.11 ...
ENTRY_BYTES = 112  # ... and each candidate with its log-probability
MAX_STEPS = 64  # of a choice that are told apart; an event loop further behind has to save work


class ClientGone(Exception):
    """The client has closed the connection, or reads too slowly to be served."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained since it was last looked at."""

    index: int  # of the choice
    text: str
    tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    num_cached_tokens: int
    final: RequestUpdate | None  # the update that ended the choice
    step_ends: tuple[tuple[int, int], ...] = ()  # characters and tokens at the end of each step

    def steps(self) -> Iterator["Delta"]:
        """The same, step by step."""
        last = len(self.step_ends) - 1
        if last < 1:
            yield self
            return
        at_text = at_token = 0
        for step, (text_end, token_end) in enumerate(self.step_ends):
            yield replace(
                self,
                text=self.text[at_text:text_end],
                tokens=self.tokens[at_token:token_end],
                prompt_logprobs=() if step else self.prompt_logprobs,
                final=self.final if step == last else None,
                step_ends=(),
            )
            at_text, at_token = text_end, token_end

    def parts(self, most: int) -> Iterator["Delta"]:
        """The same, with the scores of at most so many tokens of the prompt in each."""
        scored = self.prompt_logprobs
        last = max(0, len(scored) - 1) // most * most
        for at in range(0, last, most):
            yield Delta(self.index, "", (), scored[at : at + most], self.num_cached_tokens, None)
        yield replace(self, prompt_logprobs=scored[last:]) if last else self


@dataclass(slots=True)
class _Pending:
    texts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_cached_tokens: int = 0
    final: RequestUpdate | None = None
    num_characters: int = 0
    step_ends: list[tuple[int, int]] = field(default_factory=list)

    def add(self, update: RequestUpdate, max_steps: int) -> None:
        """Beyond `max_steps`, steps are not told apart."""
        self.texts.append(update.text)
        self.tokens.extend(update.tokens)
        self.prompt_logprobs.extend(update.prompt_logprobs)
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)
        if update.finish_reason is not None:
            self.final = update
        self.num_characters += len(update.text)
        if len(self.step_ends) >= max_steps:
            self.step_ends.pop()
        self.step_ends.append((self.num_characters, len(self.tokens)))


class Answer:
    """All choices of one HTTP request, as far as they have come."""

    def __init__(self, requests: Sequence[Request], max_pending_bytes: int) -> None:
        """`max_pending_bytes` may wait while the client takes nothing, or what one step makes; and
        the scores of prompts, which come as fast as these are computed."""
        self.requests = tuple(requests)
        self._index_of = {r.request_id: i for i, r in enumerate(self.requests)}
        steps, scores = sum(map(_step_bytes, requests)), sum(map(_scored_bytes, requests))
        self._max_pending_bytes = max(max_pending_bytes, steps) + scores
        self._pending: dict[int, _Pending] = {}
        self._num_pending_bytes = 0
        self._is_writing = False  # what was read waits for the client to take it
        self._unfinished = set(self._index_of)
        self._is_gone = False
        self._changed = asyncio.Event()

    @property
    def unfinished(self) -> frozenset[str]:
        """Ids of the engine requests that have had no final update."""
        return frozenset(self._unfinished)

    @property
    def is_gone(self) -> bool:
        """Whether nobody will read any more: the client has left, or left too much unread."""
        return self._is_gone

    @property
    def has_ended(self) -> bool:
        """Whether every choice has ended and all of it has been read."""
        return not self._unfinished and not self._pending

    def put(self, update: RequestUpdate, max_steps: int = MAX_STEPS) -> None:
        """Take an update in; never waits. So many steps of a choice, 1 or more, stay apart."""
        if update.finish_reason is not None:
            self._unfinished.discard(update.request_id)
        if self._is_gone:
            return
        # What waits for anything else than the client is not the client's fault.
        if self._is_writing and self._num_pending_bytes >= self._max_pending_bytes:
            self.abandon()
            return
        pending = self._pending.setdefault(self._index_of[update.request_id], _Pending())
        pending.add(update, 1 if self._is_writing else max_steps)
        self._num_pending_bytes += _weight(update)
        self._changed.set()

    def abandon(self) -> None:
        """Nobody will read any more: drop what waits, and tell whoever tries."""
        self._is_gone = True
        self._pending.clear()
        self._changed.set()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While the block runs, the client has not taken what was read before.

        Raises ClientGone at once if the client has gone.
        """
        if self._is_gone:
            raise ClientGone
        self._is_writing = True
        try:
            yield
        finally:
            self._is_writing = False

    async def next(self, timeout: float | None) -> list[Delta]:
        """What has come since the last call, by choice; empty after `timeout` silent seconds.

        Raises ClientGone once the client has gone or has left too much unread.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return []
        if self._is_gone:
            raise ClientGone
        self._changed.clear()
        pending, self._pending = self._pending, {}
        self._num_pending_bytes = 0
        return [_merge(index, pending[index]) for index in sorted(pending)]


def _step_bytes(request: Request) -> int:
    """What one more token of its answer weighs."""
    shown = request.sampling.logprobs
    return TOKEN_BYTES + (0 if shown is None else ENTRY_BYTES * (1 + shown))


def _scored_bytes(request: Request) -> int:
    """What the scores of its prompt weigh."""
    scored = request.sampling.prompt_logprobs
    return 0 if scored is None else ENTRY_BYTES * (1 + scored) * request.num_prompt_tokens


def _weight(update: RequestUpdate) -> int:
    entries = [token.logprob for token in update.tokens if token.logprob is not None]
    num_entries = sum(1 + len(entry.top) for entry in (*entries, *update.prompt_logprobs))
    text_bytes = 4 * len(update.text)  # at most
    return text_bytes + TOKEN_BYTES * len(update.tokens) + ENTRY_BYTES * num_entries


def _merge(index: int, pending: _Pending) -> Delta:
    return Delta(
        index=index,
        text="".join(pending.texts),
        tokens=tuple(pending.tokens),
        prompt_logprobs=tuple(pending.prompt_logprobs),
        num_cached_tokens=pending.num_cached_tokens,
        final=pending.final,
        step_ends=tuple(pending.step_ends),
    )
