"""What the exchange asks of an API: its events for what a step gave, and its body for all of it.

The exchange reads, counts and watches the client; a translator knows one API's words and keeps what
its events depend on. Knows no HTTP and no engine.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

from duetto.core.batch import SampledToken, TokenLogprob
from duetto.core.draft_counts import NO_DRAFTS, DraftCount
from duetto.server.http.errors import ApiError
from duetto.server.http.json_parts import Json, encode


class Usage(NamedTuple):
    """Tokens. Every prompt counts once, however many answers it has."""

    num_prompt: int
    num_output: int
    num_cached: int
    drafts: DraftCount = NO_DRAFTS


class Ending(NamedTuple):
    """How a choice ended."""

    reason: str | None  # "stop" or "length"
    stop_reason: int | str | None  # the caller's own stop token or stop string
    timings: Json | None


class AnswerStep(NamedTuple):
    """What a step gave one choice."""

    choice: int
    text: str  # that became certain; may be empty
    tokens: tuple[SampledToken, ...]
    ending: Ending | None
    scored: Sequence[TokenLogprob] = ()  # the next tokens of its prompt, if they are shown


class WholeAnswer(NamedTuple):
    """One choice from its first token to its end."""

    choice: int
    text: str
    tokens: Sequence[SampledToken]
    scored: Sequence[TokenLogprob]  # the tokens of its prompt
    ending: Ending | None
    steps: Sequence[tuple[str, int]] = ()  # of each: text and number of tokens, if it is parsed


class Translator(Protocol):
    """Events are bytes as they are sent; empty bytes are none."""

    keep_alive: ClassVar[bytes]  # what is sent while nothing comes

    def opening(self, usage: Callable[[], Usage]) -> bytes:
        """Before any token."""
        ...

    def step(self, step: AnswerStep, usage: Callable[[], Usage]) -> bytes:
        """Tokens are shown also where they have no text, or none yet: clients measure the gaps
        between events."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """After every choice has ended."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """Instead of the rest, in the middle of a stream."""
        ...

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        """The body of a reply that is not streamed."""
        ...


def data_event(body: Json) -> bytes:
    return b"data: " + encode(body) + b"\n\n"


def named_event(name: str, body: Json) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(body) + b"\n\n"
