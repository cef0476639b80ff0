"""What a part of an answer's text is, and what a parser of answers promises.

An answer is fed to its parser as text that is certain, cut anyhow:
- cutting it differently changes nothing but where pieces are cut;
- no character is lost or doubled: what looked like a call and was none is content, and a call's
  name is one of the request's tools, or it is content. Markers, the white space beside them, and
  what of a closing marker the end of an answer cuts off are no part of any piece;
- a call's arguments are JSON text: what the model wrote, where its dialect writes JSON;
- time is linear in the text; what is held back is bounded, or it is the text of one call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. Calls are numbered from 0, in the order of the text."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of a call's arguments, JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call has ended; each one that has started does.

    Not complete: the answer ended within the arguments, or what followed cannot be part of them.
    """

    index: int
    is_complete: bool = True


AnswerPiece = Content | Reasoning | CallStart | CallArguments | CallEnd


@dataclass(frozen=True)
class ToolSchema:
    """What a dialect knows of a tool: its name, and the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


class AnswerParser(Protocol):
    """The parser of one answer."""

    def push(self, text: str) -> list[AnswerPiece]:
        """The pieces that became certain. Text that is certain is never taken back."""
        ...

    def finish(self) -> list[AnswerPiece]:
        """The answer has ended; what was held back comes."""
        ...
