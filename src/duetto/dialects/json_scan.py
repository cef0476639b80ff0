"""Where a JSON object ends, found while its text comes. Knows only strings and brackets."""

import re

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_CLOSING = {"{": "}", "[": "]"}


class JsonScanner:
    """Reads one object or list from its opening bracket on."""

    __slots__ = ("_closing", "_is_escaped", "_is_string", "is_broken", "is_complete")

    def __init__(self) -> None:
        self._closing: list[str] = []  # the brackets that must close, the innermost last
        self._is_string = False
        self._is_escaped = False  # a backslash was the last character
        self.is_complete = False
        self.is_broken = False  # a bracket closes what is not open

    def scan(self, text: str, start: int) -> int:
        """Read on; how far `text` belongs to the value. All of it, if the value goes on."""
        at = start
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_INSIDE if self._is_string else _OUTSIDE).search(text, at)
            if found is None:
                return len(text)
            at = found.end()
            if not self._read(found.group()):
                return at - 1 if self.is_broken else at
        return len(text)

    def _read(self, char: str) -> bool:
        """Whether the value goes on behind this character."""
        if char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_string = not self._is_string
        elif char in _CLOSING:
            self._closing.append(_CLOSING[char])
        elif self._closing.pop() != char:
            self.is_broken = True
        else:
            self.is_complete = not self._closing
        return not (self.is_complete or self.is_broken)
