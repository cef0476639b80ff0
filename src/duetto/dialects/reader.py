"""An answer's text that comes in parts, read as if it were whole.

A dialect is a generator over a Reader: it reads in plain order, and stops (`yield`) where the text
that has come does not decide. What it reads is held until it is known what it was: `commit` says a
marker, `give_back` says text after all. So text is looked at once, and how it is cut changes
nothing.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from duetto.dialects.json_scan import JsonScanner
from duetto.dialects.pieces import (
    AnswerPiece,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
)
from duetto.dialects.words import Markers, Words

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields where more text is needed
Emit = Callable[[str], None]
Kept = Callable[[str, int, int], int]  # of text[start:end]: where the end begins that is kept back

SPACE = " \t\r\n"
MOST_SPACE = 64  # characters of white space beside a marker that count as part of it


class NotACall(Exception):  # control flow, not an error
    """What has been read is no call after all."""


class CutOff(NotACall):
    """The answer ended in the middle."""


class Reader:
    """The text of one answer, and the pieces that were made of it."""

    def __init__(self) -> None:
        self._text = ""  # what has come; from _at on it is not read
        self._at = 0
        self._is_over = False
        self._held: list[str] = []  # read, and not known what it is
        self._pieces: list[AnswerPiece] = []
        self._num_calls = 0
        self._is_call_open = False
        self._is_closing = False  # only what ends calls is expected
        self._is_line_blank = True  # before the text that is not read
        self._kind: type[Content] | type[Reasoning] = Content

    # What the parser does with it

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def close(self) -> None:
        self._is_over = True

    def taken(self) -> list[AnswerPiece]:
        pieces, self._pieces = self._pieces, []
        return joined(pieces)

    # What became of what was read

    def commit(self) -> None:
        """What is held was a marker, or beside one."""
        self._held.clear()
        self._is_line_blank = True

    def reread(self) -> None:
        """What is held is read again, by whoever reads next. Only for what is short."""
        self._text = "".join((*self._held, self._text[self._at :]))
        self._at = 0
        self._held.clear()

    def give_back(self, why: NotACall) -> None:
        """What is held was content, but for a closing marker that the answer's end cuts off."""
        self._kind = Content
        if self._is_call_open:
            self._end_call(is_complete=False)
        if self._is_closing and isinstance(why, CutOff):
            self._held.clear()
            self._at = len(self._text)
        self._flush()

    def start_call(self, name: str) -> None:
        self.commit()
        self._pieces.append(CallStart(self._num_calls, name))
        self._is_call_open, self._is_closing = True, False

    def arguments(self, text: str) -> None:
        self._pieces.append(CallArguments(self._num_calls, text))

    def end_call(self) -> None:
        self.commit()
        self._end_call(is_complete=True)
        self._is_closing = True

    def whole_call(self, name: str, arguments: str) -> None:
        self.start_call(name)
        self.arguments(arguments)
        self.end_call()

    def expect_call(self) -> None:
        """Another call has to come: what follows is not only what ends calls."""
        self._is_closing = False

    def expect_end(self) -> None:
        """What follows is only a marker: if the answer's end cuts it off, it is no text."""
        self._is_closing = True

    # Reading: each is `yield from`

    def peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while self._at == len(self._text):
            if self._is_over:
                return ""
            yield
        return self._text[self._at]

    def spaces(self) -> Reading[None]:
        """White space, as much as counts beside a marker."""
        for _ in range(MOST_SPACE):
            char = yield from self.peek()
            if not char or char not in SPACE:
                return
            self._read(self._at + 1)

    def next(self) -> str:
        """Read the character that `peek` has seen."""
        return self._read(self._at + 1)

    def marker_ends(self) -> Reading[None]:
        """What is held was a marker, and the white space behind it is part of it."""
        yield from self.spaces()
        self.commit()

    def literal(self, words: Words) -> Reading[str | None]:
        """The longest of the words with which the text goes on; None, and nothing read, if none."""
        found = None
        length = 0
        while words.may_become(self._text[self._at : self._at + length]):
            if self._at + length == len(self._text):
                if self._is_over:
                    break
                yield
                continue
            length += 1
            if self._text[self._at : self._at + length] in words:
                found = length
        if found is None:
            return None
        return self._read(self._at + found)

    def expect(self, words: Words) -> Reading[str]:
        """As `literal`, where nothing else can be."""
        found = yield from self.literal(words)
        if found is None:
            is_cut = self._is_over and words.may_become(self._text[self._at :])
            raise CutOff if is_cut else NotACall
        return found

    def upto(self, markers: Markers, limit: int) -> Reading[tuple[str, str]]:
        """The text up to a marker, at most `limit` characters, and the marker."""
        parts: list[str] = []
        left = limit
        while True:
            found = markers.find(self._text, self._at)
            end = found[0] if found else markers.begun(self._text, self._at)
            if end - self._at > left:
                self._read(self._at + left)  # always as much, however the text is cut
                raise NotACall
            left -= end - self._at
            parts.append(self._read(end))
            if found:
                return "".join(parts), self._read(end + len(found[1]))
            if self._is_over:
                self._read(len(self._text))
                raise CutOff
            yield

    def text_until(
        self, markers: Markers, kind: type[Content] | type[Reasoning]
    ) -> Reading[str | None]:
        """Emit text up to a marker, which is held with the white space before it.

        None at the end of the answer.
        """
        self._kind = kind
        while True:
            marker = yield from self.value_until(markers, self._emit, _space_before)
            if marker is None or marker not in markers.at_line_start:
                break
            if self._is_line_blank or any("\n" in space for space in self._held):
                break
            self._flush()
        self._is_closing = False
        return marker

    def value_until(self, markers: Markers, emit: Emit, kept: Kept) -> Reading[str | None]:
        """Hand text on as it comes, up to a marker, which is held.

        `kept` says where in a text the end begins that is held with the marker, if one follows.
        """
        while True:
            text, start = self._text, self._at
            found = markers.find(text, start)
            if found and not self._is_over and markers.begun(text, start) < found[0]:
                found = None  # it may be a part of another that has begun before it
            end = found[0] if found else len(text) if self._is_over else markers.begun(text, start)
            certain = kept(text, start, end) if found or not self._is_over else end
            if certain > start:
                self._at = certain
                emit(text[start:certain])
            if found:
                self._read(end + len(found[1]))
                return found[1]
            if self._is_over:
                return None
            yield

    def rest(self) -> Reading[None]:
        """All that comes is content."""
        self._kind = Content
        while True:
            if self._at < len(self._text):
                text, self._at = self._text[self._at :], len(self._text)
                self._emit(text)
            if self._is_over:
                return
            yield

    def json_object(self, emit: Emit) -> Reading[None]:
        """A JSON object, handed on as it comes. What breaks it is not read."""
        if (yield from self.peek()) != "{":
            raise NotACall
        scanner = JsonScanner()
        while True:
            text, start = self._text, self._at
            self._at = scanner.scan(text, start)
            if self._at > start:
                emit(text[start : self._at])
            if scanner.is_complete:
                return
            if scanner.is_broken:
                raise NotACall
            if self._is_over:
                raise CutOff
            yield

    def hold(self, text: str) -> None:
        """Text that was handed on may yet be no call's."""
        self._held.append(text)

    def json_arguments(self, name: str) -> Reading[None]:
        """A call whose arguments are the JSON object that follows."""
        if (yield from self.peek()) != "{":
            raise NotACall
        self.start_call(name)
        yield from self.json_object(self.arguments)
        self.end_call()

    # Parts of the above

    def _read(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        if text:
            self._held.append(text)
        return text

    def _end_call(self, *, is_complete: bool) -> None:
        self._pieces.append(CallEnd(self._num_calls, is_complete))
        self._num_calls += 1
        self._is_call_open = False

    def _flush(self) -> None:
        held = "".join(self._held)
        self._held.clear()
        if held:
            self._emit(held)

    def _emit(self, text: str) -> None:
        """A part of content or reasoning."""
        self._pieces.append(self._kind(text))
        line_start = text.rfind("\n") + 1
        if line_start:
            self._is_line_blank = True
        if text[line_start:].strip(SPACE):
            self._is_line_blank = False


def joined(pieces: Sequence[AnswerPiece]) -> list[AnswerPiece]:
    """Neighbours of one kind as one piece."""
    if len(pieces) < 2:  # nearly every token
        return list(pieces)
    groups: list[tuple[AnswerPiece, list[str]]] = []  # a piece; the texts of it and those behind
    for piece in pieces:
        if isinstance(piece, CallStart | CallEnd):
            groups.append((piece, []))
        elif groups and type(groups[-1][0]) is type(piece):
            groups[-1][1].append(piece.text)
        else:
            groups.append((piece, [piece.text]))
    return [_with_text(piece, texts) for piece, texts in groups]


def _with_text(piece: AnswerPiece, texts: list[str]) -> AnswerPiece:
    match piece:
        case Content():
            return Content("".join(texts))
        case Reasoning():
            return Reasoning("".join(texts))
        case CallArguments(index):
            return CallArguments(index, "".join(texts))
        case _:
            return piece


def _space_before(text: str, start: int, end: int) -> int:
    """Where the white space begins that ends at `end`, as far as it counts."""
    first = max(start, end - MOST_SPACE)
    while end > first and text[end - 1] in SPACE:
        end -= 1
    return end


def newline_before(text: str, start: int, end: int) -> int:
    return end - 1 if end > start and text[end - 1] == "\n" else end


def nothing_before(_text: str, _start: int, end: int) -> int:
    return end
