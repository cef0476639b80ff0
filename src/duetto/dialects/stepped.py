"""A parser of answers that is a generator over a Reader."""

from collections.abc import Callable

from duetto.dialects.pieces import AnswerPiece
from duetto.dialects.reader import Reader, Reading

Read = Callable[[Reader], Reading[None]]


class SteppedParser:
    """Feeds a Reader, and lets the generator read on."""

    def __init__(self, read: Read) -> None:
        self._reader = Reader()
        self._steps = read(self._reader)

    def push(self, text: str) -> list[AnswerPiece]:
        self._reader.add(text)
        next(self._steps, None)
        return self._reader.taken()

    def finish(self) -> list[AnswerPiece]:
        self._reader.close()
        next(self._steps, None)
        return self._reader.taken()
