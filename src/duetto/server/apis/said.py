"""What a choice has said so far: content, reasoning and calls, read from its text as it comes.

Each choice has a reader of its own, made by the model's dialect; without one, all text is content.
Knows no API's shapes.
"""

from collections.abc import Callable

from duetto.dialects.pieces import (
    AnswerParser,
    AnswerPiece,
    Content,
    Reasoning,
)
from duetto.server.apis.translator import AnswerStep, WholeAnswer

MakeParser = Callable[[], AnswerParser]


class AnswerReader:
    """The readers of one reply's choices."""

    def __init__(self, make_parser: MakeParser | None) -> None:
        self._make_parser = make_parser
        self._parsers: dict[int, AnswerParser] = {}
        self.num_reasoning = 0  # tokens of steps that added to a choice's reasoning alone

    def read(self, step: AnswerStep) -> list[AnswerPiece]:
        """What a step's text turns out to mean; what is uncertain comes with a later one."""
        if self._make_parser is None:
            return [Content(step.text)] if step.text else []
        return self._read(step.choice, step.text, len(step.tokens), is_last=step.ending is not None)

    def read_whole(self, answer: WholeAnswer) -> list[AnswerPiece]:
        """The same of an answer that has ended."""
        if self._make_parser is None:
            return [Content(answer.text)] if answer.text else []
        pieces = list[AnswerPiece]()
        for text, num_tokens in answer.steps:
            pieces += self._read(answer.choice, text, num_tokens, is_last=False)
        return pieces + self._read(answer.choice, "", 0, is_last=True)

    def _read(self, choice: int, text: str, num_tokens: int, *, is_last: bool) -> list[AnswerPiece]:
        assert self._make_parser is not None
        if (parser := self._parsers.get(choice)) is None:
            parser = self._parsers[choice] = self._make_parser()
        pieces = parser.push(text) if text else []
        if is_last:
            pieces = [*pieces, *parser.finish()]
        is_reasoning = bool(pieces) and isinstance(pieces[0], Reasoning)
        if is_reasoning and all(isinstance(piece, Reasoning) for piece in pieces):
            self.num_reasoning += num_tokens
        return pieces
