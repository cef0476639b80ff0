"""How a caller says what may be reused, before there is a prompt: the one form that the offline
door, the API and the command line read.

A choice is an object, {"method": "first", "num_first": 16}, or the same in a word, "first:16". What
a method does is core/reuse.py's to say. Knows no text and no model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from duetto.core.errors import InvalidRequest
from duetto.core.reuse import (
    LOOKS,
    MAX_ROUNDS,
    METHODS,
    LookMethod,
    Reuse,
    ReuseMethod,
    TokenRange,
)

OnUnsupported = Literal["refuse", "compute"]
OFF = "off"
# The numbers that each method takes, in the order of its word. The first one must be given.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "first": ("num_first",),
    "hkvd": ("ratio",),
    "query": ("ratio", "num_rounds"),
}
MAX_SEGMENTS = 256  # of a prompt, that are reusable: what a step plans grows with their square
_MAX_NUMBER = 2**31


@dataclass(frozen=True, slots=True)
class ReuseChoice:
    """A method with its numbers, and what to do where it cannot be done."""

    method: ReuseMethod
    numbers: tuple[tuple[str, int | float], ...] = ()
    on_unsupported: OnUnsupported = "refuse"

    def over(self, segments: tuple[TokenRange, ...]) -> Reuse:
        numbers: dict[str, Any] = dict(self.numbers)
        return Reuse(segments, self.method, **numbers)

    @property
    def amount(self) -> float | None:
        """The method's first number: a ratio, or a count of tokens."""
        return self.numbers[0][1] if self.numbers else None

    @property
    def is_lossy(self) -> bool:
        """Whether an answer may differ from that of a full prefill."""
        return dict(self.numbers).get("ratio") != 1

    @property
    def looks_by(self) -> LookMethod | None:
        """What must be looked at before it can choose; None if nothing must."""
        return LOOKS.get(self.method) if 0 < (self.amount or 0) < 1 else None

    def __str__(self) -> str:
        return _word(self.method, dict(self.numbers))


def word_of(reuse: Reuse) -> str:
    """A choice in a word, as it is read again: "query:0.15", which is chosen in one round."""
    usual, numbers = Reuse(()), NUMBERS[reuse.method]
    told = [n for n in numbers[1:] if getattr(reuse, n) != getattr(usual, n)]
    return _word(reuse.method, {name: getattr(reuse, name) for name in (*numbers[:1], *told)})


def _word(method: str, numbers: Mapping[str, float]) -> str:
    return ":".join([method, *[str(number) for number in numbers.values()]])


class ReuseLimits(NamedTuple):
    """What cannot be done with a model's KV."""

    refusal: str | None = None  # why none of it can be brought to another place
    window: int | None = None  # tokens that its shortest sliding window holds
    no_deviation: str | None = None  # why nothing tells how far it deviates
    no_looks: str | None = None  # why nothing is looked at

    def why_not(self, choice: ReuseChoice, segments: tuple[TokenRange, ...] = ()) -> str | None:
        """Why this choice cannot be made on the model, or not of these segments."""
        if self.no_looks is not None and choice.looks_by is not None:
            return f"method {choice.method} cannot choose: {self.no_looks}"
        if self.no_deviation is not None and choice.looks_by == "deviation":
            return f"method {choice.method} cannot choose: {self.no_deviation}"
        longest = max((end - start for start, end in segments), default=0)
        if self.refusal is None and self.window is not None and longest > self.window:
            return (
                f"not moved: a segment of {longest} tokens is longer than this model's sliding "
                f"window of {self.window}"
            )
        return None if self.refusal is None else f"not moved: {self.refusal}"


NO_LIMITS = ReuseLimits()


class ReuseAsked(NamedTuple):
    """What is asked for one prompt."""

    choice: ReuseChoice
    segments: tuple[TokenRange, ...]
    refusal: InvalidRequest | None = None  # why it cannot be done, if that is known already


def too_many_segments(field: str, count: int) -> InvalidRequest:
    return InvalidRequest(field, f"{count} segments are reusable; at most {MAX_SEGMENTS} can be")


def not_measured(choice: ReuseChoice) -> str | None:
    """What is said of a lossy choice where nothing is known of its quality."""
    if not choice.is_lossy:
        return None
    return (
        f"{choice} changes answers, and nothing says how much on this model; "
        f"--allow-unmeasured-reuse lets the server take it"
    )


def insisted(_: ReuseChoice) -> None:
    """Whoever asks has decided that it is good enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseRules:
    """What callers get who do not choose, and who may choose what."""

    default: ReuseChoice | None = None
    why_not: Callable[[ReuseChoice], str | None] = not_measured
    limits: ReuseLimits = NO_LIMITS

    def chosen(self, given: object) -> ReuseChoice | None:
        """Raises InvalidRequest, naming the field, for what is no choice."""
        return self.default if given is None else parse_reuse(given)

    def asked(
        self,
        choice: ReuseChoice,
        segments: tuple[TokenRange, ...],
        refusal: InvalidRequest | None = None,
    ) -> ReuseAsked:
        """What is asked for a prompt with these segments; `refusal` is of who knows one already."""
        if refusal is None and segments:
            reason = self.limits.why_not(choice, segments) or self.why_not(choice)
            refusal = None if reason is None else InvalidRequest("reuse", reason)
            if len(segments) > MAX_SEGMENTS:
                refusal = too_many_segments("reuse", len(segments))
        return ReuseAsked(choice, segments, refusal)


def parse_reuse(given: object, field: str = "reuse") -> ReuseChoice | None:
    """A choice from a word or an object; None for "off" and false: all is computed.

    Raises InvalidRequest, naming `field` and what is wrong within it.
    """
    if given is False or given == OFF:
        return None
    if isinstance(given, str):
        given = _object_of(given, field)
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            field, "must be a word like query:0.15, an object with a method, or false"
        )
    method, accepted = given.get("method"), ", ".join((*METHODS, OFF))
    if method is None:
        raise InvalidRequest(f"{field}.method", f"is required: one of {accepted}")
    if method not in METHODS:
        raise InvalidRequest(f"{field}.method", f"{_shown(method)} is not one of {accepted}")
    names = NUMBERS[method]
    for key in given:
        if key not in (*names, "method", "on_unsupported"):
            takes = ", ".join((*names, "on_unsupported"))
            raise InvalidRequest(f"{field}.{key!s:.40}", f"method {method} takes {takes}")
    asks: Any = given.get("on_unsupported") or "refuse"
    if asks not in get_args(OnUnsupported):
        accepted = ", ".join(get_args(OnUnsupported))
        raise InvalidRequest(f"{field}.on_unsupported", f"{_shown(asks)} is not one of {accepted}")
    numbers = [(name, given[name]) for name in names if given.get(name) is not None]
    if names and (not numbers or numbers[0][0] != names[0]):
        raise InvalidRequest(f"{field}.{names[0]}", f"method {method} needs it")
    for name, value in numbers:
        _check(f"{field}.{name}", name, value)
    return ReuseChoice(method, tuple(numbers), asks)


def _object_of(word: str, field: str) -> dict[str, Any]:
    """ "query:0.15:2" as an object."""
    method, *numbers = word.split(":")
    names = NUMBERS.get(method, ()) if method in METHODS else ()
    if method in METHODS and len(numbers) > len(names):
        raise InvalidRequest(field, f"{word!r:.60}: method {method} takes {len(names)} at most")
    return {"method": method, **{n: _number(t) for n, t in zip(names, numbers, strict=False)}}


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check(field: str, name: str, value: object) -> None:
    if name == "ratio":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InvalidRequest(field, f"must be from 0 to 1, not {_shown(value)}")
        return
    least, most = (0, _MAX_NUMBER) if name == "num_first" else (1, MAX_ROUNDS)
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(
            field, f"must be a whole number from {least} to {most:,}, not {_shown(value)}"
        )


def _shown(value: object) -> str:
    """Python refuses to write numbers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 64 bits"
    return f"{value!r:.60}"
