"""An answer that has ended, as what it says: content, reasoning and calls of tools.

Knows no API's shapes but the message that goes back into a conversation.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from duetto.dialects.pieces import (
    AnswerParser,
    AnswerPiece,
    CallArguments,
    CallStart,
    Content,
    Reasoning,
)


@dataclass(slots=True)
class SaidCall:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """An answer as a whole."""

    content: str = ""
    reasoning: str = ""
    calls: list[SaidCall] = field(default_factory=list)


def gathered(pieces: Iterable[AnswerPiece]) -> Said:
    said, contents, thoughts = Said(), list[str](), list[str]()
    arguments: list[list[str]] = []
    for piece in pieces:
        match piece:
            case Content(text):
                contents.append(text)
            case Reasoning(text):
                thoughts.append(text)
            case CallStart(_, name):
                said.calls.append(SaidCall(call_id(), name))
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
            case _:
                pass
    said.content, said.reasoning = "".join(contents), "".join(thoughts)
    for call, parts in zip(said.calls, arguments, strict=True):
        call.arguments = "".join(parts)
    return said


def call_id(prefix: str = "call_") -> str:
    return prefix + secrets.token_hex(12)


class PlainParser:
    """Of a model whose answers are their text."""

    def push(self, text: str) -> list[AnswerPiece]:
        return [Content(text)] if text else []

    def finish(self) -> list[AnswerPiece]:
        return []


def message_of(parser: AnswerParser, text: str) -> dict[str, Any]:
    """The assistant's message that an answer is, as conversations take it."""
    said = gathered([*parser.push(text), *parser.finish()])
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["content"] = said.content or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in said.calls
        ]
    return message
