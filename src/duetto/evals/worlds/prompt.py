"""The user turn: documents and a question, a line each, as the demo models learn to read it."""

from collections.abc import Sequence
from typing import TypedDict

DOCUMENT = "Document: "
QUESTION = "Question: "
REASON = ": "  # between what an answer follows from and the answer


class ChatTurn(TypedDict):
    role: str
    content: str


def user_turn(documents: Sequence[str], question: str) -> ChatTurn:
    """One message. Without documents the question stands alone."""
    lines = [*(DOCUMENT + document for document in documents), QUESTION + question]
    return {"role": "user", "content": "\n".join(lines)}


def is_exact(answer: str, gold: str) -> bool:
    """Equal but for white space around and a full stop at the end.

    What stands before a colon ("Tovard: Rusford") is how the answer was come by, and is not judged.
    """
    return answer.rpartition(REASON)[2].strip().removesuffix(".") == gold
