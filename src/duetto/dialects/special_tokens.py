"""Special tokens in the text of an answer: markers of a dialect stay, the others are dropped."""

from collections.abc import Iterable

from duetto.dialects.pieces import AnswerParser, AnswerPiece, Content, Reasoning
from duetto.dialects.reader import joined
from duetto.dialects.words import Markers, Words


class WithoutSpecialTokens:
    """A parser whose content and reasoning leave special tokens out.

    Arguments of calls are the model's text as it is: a string in them may name a token.
    """

    def __init__(self, parser: AnswerParser, special_tokens: Iterable[str]) -> None:
        self._parser = parser
        self._drop = _Dropper(special_tokens)

    def push(self, text: str) -> list[AnswerPiece]:
        return self._without(self._parser.push(text))

    def finish(self) -> list[AnswerPiece]:
        pieces = self._without(self._parser.finish())
        return joined([*pieces, *self._drop.flush()])

    def _without(self, pieces: list[AnswerPiece]) -> list[AnswerPiece]:
        out: list[AnswerPiece] = []
        for piece in pieces:
            if isinstance(piece, Content | Reasoning):
                out += self._drop.push(piece)
            else:
                out += [*self._drop.flush(), piece]
        return joined(out)


class _Dropper:
    """Drops tokens from text that comes in parts. One that is cut off stays."""

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = {token for token in tokens if token}
        self._words = Words(tokens)  # one may begin with another: the longest is meant
        self._markers = Markers(*_shortest(tokens)) if tokens else None
        self._kind: type[Content] | type[Reasoning] = Content
        self._left = ""  # of the last text: it may be the beginning of a token

    def push(self, piece: Content | Reasoning) -> list[AnswerPiece]:
        before = [] if type(piece) is self._kind else self.flush()
        self._kind = type(piece)
        text, self._left = self._left + piece.text, ""
        return [*before, *self._kept(text, is_over=False)]

    def flush(self) -> list[AnswerPiece]:
        text, self._left = self._left, ""
        return self._kept(text, is_over=True)

    def _kept(self, text: str, *, is_over: bool) -> list[AnswerPiece]:
        parts: list[str] = []
        at = 0
        while self._markers is not None:
            found = self._markers.find(text, at)
            end = found[0] if found else len(text) if is_over else self._markers.begun(text, at)
            parts.append(text[at:end])
            at = end
            if not found:
                break
            length = self._longest_token(text, end, is_over=is_over)
            if length is None:
                break
            at = end + length
        else:
            parts.append(text)
            at = len(text)
        self._left = text[at:]
        kept = "".join(parts)
        return [self._kind(kept)] if kept else []

    def _longest_token(self, text: str, start: int, *, is_over: bool) -> int | None:
        """The length of the token at `start`; None if more text has to say which it is."""
        longest, length = 0, 0
        while self._words.may_become(text[start : start + length]):
            if start + length == len(text):
                return longest if is_over else None
            length += 1
            if text[start : start + length] in self._words:
                longest = length
        return longest


def _shortest(tokens: Iterable[str]) -> list[str]:
    """Those that begin with no other."""
    found: list[str] = []
    for token in sorted(tokens):
        if not (found and token.startswith(found[-1])):
            found.append(token)
    return found
