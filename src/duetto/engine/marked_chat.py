"""A conversation of which some texts are marked as reusable, rendered as segments.

A template is a program: where a text comes out, and whether as it went in, only it knows. So the
conversation is rendered twice: as it is, and with a random word in place of each marked text. If
each word comes out once, and the pieces around the words with the true texts between them are the
true prompt, letter by letter, these are the segments. Else no place is claimed, and it is said why.
Knows no tokens and no Jinja.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from duetto.core.errors import InvalidRequest
from duetto.engine.segments import PromptSegment

MARK = "cache"  # the key of a text part ...
REUSABLE = "reusable"  # ... and the one value that it takes
_ADVICE = "so it has no place of its own. Leave its mark out"
Conversation = Sequence[Mapping[str, Any]]
Render = Callable[[Conversation, Conversation], str]  # messages and documents to a prompt


class RenderedChat(NamedTuple):
    """The prompt, and the same in segments. Without them, nothing is marked or it is said why."""

    text: str
    segments: tuple[PromptSegment, ...] = ()
    refusal: InvalidRequest | None = None


class _Mark(NamedTuple):
    field: str
    text: str
    word: str  # stands for the text


class _Marks:
    """What is marked, with a word for each that nobody can know beforehand: letters and digits,
    which templates escape in no way."""

    def __init__(self) -> None:
        self._stem = f"Kq7{secrets.token_hex(12)}n"
        self._marks: list[_Mark] = []

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, field: str, text: object) -> str | None:
        """The word for a text; None if there is nothing to reuse."""
        if not isinstance(text, str) or not text:
            return None
        word = f"{self._stem}{len(self._marks)}zWv"
        self._marks.append(_Mark(field, text, word))
        return word

    def found_in(self, pieces: str) -> list[tuple[_Mark, int]] | InvalidRequest:
        """In their order, where each word begins; or the first that is not there once."""
        found = list(re.finditer(rf"{self._stem}(\d+)zWv", pieces))
        numbers = [int(match.group(1)) for match in found]
        counts = Counter(numbers)
        for number, mark in enumerate(self._marks):
            if counts[number] != 1:
                times = f"{counts[number]} times" if counts[number] else "not at all, or changed"
                return InvalidRequest(mark.field, f"the chat template shows it {times}; {_ADVICE}")
        return [(self._marks[n], match.start()) for n, match in zip(numbers, found, strict=True)]


def render_marked(
    render: Render, messages: Conversation, documents: Conversation = ()
) -> RenderedChat:
    """`render` makes a prompt of messages and documents, always the same of the same.

    Marked are the text parts with {"cache": "reusable"}, and the text of each document. Raises
    what `render` raises, and InvalidRequest for a mark that is none.
    """
    if not _is_list(messages) or not _is_list(documents):
        return RenderedChat(render(messages, documents))  # which refuses them, in its words
    marks = _Marks()
    plain, with_words = _read_messages(messages, marks)
    document_words = _read_documents(documents, marks)
    text = render(plain, documents)
    if not marks:
        return RenderedChat(text)
    pieces = render(with_words, document_words)
    found = _place(pieces, text, marks)
    if isinstance(found, InvalidRequest):
        again = render(plain, documents)  # a template may show the time
        found = _place(pieces, again, marks)
    if isinstance(found, InvalidRequest):
        return RenderedChat(text, refusal=found)
    return RenderedChat("".join([str(segment.content) for segment in found]), tuple(found))


def _place(pieces: str, text: str, marks: _Marks) -> list[PromptSegment] | InvalidRequest:
    """The segments of `text`, told by `pieces`, the same with words for what is marked."""
    places = marks.found_in(pieces)
    if isinstance(places, InvalidRequest):
        return places
    field, start = places[0][0].field, 0
    found: list[tuple[str, PromptSegment]] = []  # and the mark that it follows, or is
    for mark, at in places:
        found.append((field, PromptSegment(pieces[start:at])))
        field, start = mark.field, at + len(mark.word)
        found.append((field, PromptSegment(mark.text, is_reusable=True)))
    found.append((field, PromptSegment(pieces[start:])))
    changed = _first_change(found, text)
    if changed is None:
        return [segment for _, segment in found if segment.content]
    why = "the chat template changes it (blank space at its ends?) or what is beside it"
    return InvalidRequest(changed, f"{why}; {_ADVICE}")


def _first_change(found: Sequence[tuple[str, PromptSegment]], text: str) -> str | None:
    """Where the segments are not the text: the mark that is nearest. None: they are the text."""
    at = 0
    for field, segment in found:
        if not text.startswith(str(segment.content), at):
            return field
        at += len(segment.content)
    return None if at == len(text) else found[-1][0]


def _is_list(given: object) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | Mapping)


def _read_messages(
    messages: Conversation, marks: _Marks
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The messages without their marks, and the same with words for what is marked."""
    plain, with_words = list[Mapping[str, Any]](), list[Mapping[str, Any]]()
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str) or not isinstance(content, Sequence):
            plain.append(message)  # what is no message is the template's to refuse
            with_words.append(message)
            continue
        parts, worded = [], []
        for at, part in enumerate(content):
            own = _without_mark(part)
            word = _read_part(f"messages[{index}].content[{at}]", part, marks)
            parts.append(own)
            worded.append(own if word is None else {**own, "text": word})
        plain.append({**message, "content": parts})
        with_words.append({**message, "content": worded})
    return plain, with_words


def _without_mark(part: Any) -> Any:
    if not isinstance(part, Mapping) or MARK not in part:
        return part
    return {key: value for key, value in part.items() if key != MARK}


def _read_part(field: str, part: object, marks: _Marks) -> str | None:
    if not isinstance(part, Mapping) or part.get(MARK) is None:
        return None
    if part[MARK] != REUSABLE:
        raise InvalidRequest(f"{field}.{MARK}", f"must be {REUSABLE!r}, not {part[MARK]!r:.60}")
    return marks.add(field, part.get("text"))


def _read_documents(documents: Conversation, marks: _Marks) -> list[Mapping[str, Any]]:
    with_words = list[Mapping[str, Any]]()
    for index, document in enumerate(documents):
        text = document.get("text") if isinstance(document, Mapping) else None
        word = marks.add(f"documents[{index}]", text)
        with_words.append(document if word is None else {**document, "text": word})
    return with_words
