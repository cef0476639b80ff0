"""Values written otherwise than in JSON, as JSON text: Python's literals, Gemma's.

Nothing is evaluated: the text is a model's. What is nested deeper than `_MOST_DEPTH` is refused.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

_MOST_DEPTH = 64
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_WORDS = {"True": "true", "False": "false", "None": "null"} | {
    word: word for word in ("true", "false", "null")
}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"}
_ESCAPES |= {"\\": "\\", "'": "'", '"': '"', "\n": ""}
_ESCAPE = re.compile(r"\\(?:x([\da-fA-F]{2})|u([\da-fA-F]{4})|U([\da-fA-F]{8})|([\s\S]))")


class NotALiteral(ValueError):
    """The text is no value in this notation."""


@dataclass(frozen=True)
class Notation:
    """How values are written. Between tokens there may be white space."""

    token: re.Pattern[str]  # its groups: string, word (a number, too), mark
    unquoted: Callable[[str], str]  # the text of a string token
    has_bare_strings: bool = False  # a word that is nothing else is a string; keys are words, too


def string_to_json(text: str) -> str:
    """A JSON string; half a surrogate pair, which has no UTF-8, is written as an escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False)


def object_to_json(text: str, notation: Notation, separator: str) -> str:
    """Keys and values, `separator` between them, as an object. Raises NotALiteral."""
    tokens = _Tokens(text, notation)
    members = tokens.members("", separator, depth=0)
    return f"{{{members}}}"


def value_to_json(text: str, notation: Notation) -> str:
    """One value. Raises NotALiteral."""
    tokens = _Tokens(text, notation)
    value = tokens.value(depth=0)
    tokens.expect("")
    return value


class _Tokens:
    """The tokens of a text, and what is built of them from where one has come to."""

    def __init__(self, text: str, notation: Notation) -> None:
        self._notation = notation
        self._tokens: list[tuple[str, str]] = []  # kind, text
        at = len(text) - len(text.lstrip())
        while at < len(text):
            found = notation.token.match(text, at)
            if found is None or found.lastgroup is None:
                raise NotALiteral(f"no token at {at}")
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        self._tokens.append(("mark", ""))  # the end
        self._at = 0

    def expect(self, mark: str) -> None:
        if not self._goes_on(mark):
            raise NotALiteral(f"expected {mark!r}")

    def members(self, closing: str, separator: str, *, depth: int) -> str:
        """The members of an object, up to its end."""
        parts: list[str] = []
        while not self._goes_on(closing):
            if parts:
                self.expect(",")
                if self._goes_on(closing):
                    break
            key = self._key(is_word=separator == "=" or self._notation.has_bare_strings)
            self.expect(separator)
            parts.append(f"{key}: {self.value(depth=depth + 1)}")
        return ", ".join(parts)

    def value(self, *, depth: int) -> str:
        kind, text = self._next()
        if kind == "string":
            return string_to_json(text + self._rest_of_string())
        if kind == "word":
            return self._word(text)
        if text not in _CLOSING or not text or depth >= _MOST_DEPTH:
            raise NotALiteral(text)
        if text == "{":
            return f"{{{self.members('}', ':', depth=depth + 1)}}}"
        return f"[{self._items(_CLOSING[text], depth=depth + 1)}]"

    def _items(self, closing: str, *, depth: int) -> str:
        parts: list[str] = []
        while not self._goes_on(closing):
            if parts:
                self.expect(",")
                if self._goes_on(closing):
                    break
            parts.append(self.value(depth=depth))
        return ", ".join(parts)

    def _key(self, *, is_word: bool) -> str:
        kind, text = self._next()
        if kind == "mark" or (kind == "word" and not is_word):
            raise NotALiteral(f"{text!r} is no key")
        return string_to_json(text.strip())

    def _rest_of_string(self) -> str:
        """Strings beside each other are one, as in Python."""
        parts: list[str] = []
        while self._tokens[self._at][0] == "string":
            parts.append(self._next()[1])
        return "".join(parts)

    def _word(self, text: str) -> str:
        text = text.strip()
        if text in _WORDS:
            return _WORDS[text]
        number = number_to_json(text)
        if number is not None:
            return number
        if self._notation.has_bare_strings:
            return string_to_json(text)
        raise NotALiteral(text)

    def _next(self) -> tuple[str, str]:
        kind, text = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return kind, self._notation.unquoted(text) if kind == "string" else text

    def _goes_on(self, mark: str) -> bool:
        if self._tokens[self._at] != ("mark", mark):
            return False
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return True


def number_to_json(text: str) -> str | None:
    """A number as JSON writes it; None for what is none."""
    text = text.replace("_", "").removeprefix("+")
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    whole, point, fraction = digits.partition(".")
    exponent = ""
    if point:
        fraction, mark, power = fraction.replace("E", "e").partition("e")
        exponent = mark + power
    written = sign + (whole or "0") + (f".{fraction or '0'}" if point else "") + exponent
    if not any(char.isdigit() for char in whole + fraction):
        return None
    return written if _JSON_NUMBER.fullmatch(written) else None


def python_unquoted(token: str) -> str:
    """The text of a Python string, which begins with its quote."""
    return _ESCAPE.sub(_unescaped, token[1:-1]) if "\\" in token else token[1:-1]


def _unescaped(found: re.Match[str]) -> str:
    *codes, char = found.groups()
    for code in codes:
        if code is not None:
            point = int(code, 16)
            return chr(point) if point <= 0x10FFFF else found[0]
    return _ESCAPES.get(char, found[0])  # an unknown escape keeps its backslash


PYTHON = Notation(
    token=re.compile(
        r"""(?:(?P<string>"[^"\\]*(?:\\[\s\S][^"\\]*)*"|'[^'\\]*(?:\\[\s\S][^'\\]*)*')"""
        r"""|(?P<word>[-+]?[\w.]+(?:(?<=[eE])[-+]\d+)?)|(?P<mark>[][(){},:=]))\s*"""
    ),
    unquoted=python_unquoted,
)
