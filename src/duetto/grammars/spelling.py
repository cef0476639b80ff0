"""How a text is written in tokens, without a tokenizer: the longest token first.

Where a grammar lets one text follow, any spelling of it may be sampled; this one is nearly always a
tokenizer's own, and found in no time. Knows no grammar.
"""

import re

from duetto.core.structured import Vocabulary
from duetto.grammars.lark import LarkWriter

LONGEST = 32  # bytes of a token that is tried
_SPECIAL = re.compile(rb"\xff\[(\d+)\]")  # as llguidance writes a token that is no text


class Spelling:
    def __init__(self, vocabulary: Vocabulary) -> None:
        special = frozenset(vocabulary.special.values())
        # Of two tokens of the same bytes the first may be a byte that stands for itself.
        self._ids = {
            token: i for i, token in enumerate(vocabulary.tokens) if token and i not in special
        }
        self._vocabulary = vocabulary
        self._names = {i: b"\xff[%d]" % i for i in special}
        self._continuing: list[int] | None = None
        self._longest = min(LONGEST, max(map(len, self._ids), default=0))

    def of(self, text: bytes, most: int) -> tuple[int, ...]:
        """At most `most` tokens with which the text begins."""
        found: list[int] = []
        at = 0
        while at < len(text) and len(found) < most:
            if (special := _SPECIAL.match(text, at)) is not None:
                found.append(int(special.group(1)))
                at = special.end()
                continue
            for size in range(min(self._longest, len(text) - at), 0, -1):
                token_id = self._ids.get(text[at : at + size])
                if token_id is not None:
                    found.append(token_id)
                    at += size
                    break
            else:
                break  # no token begins here
        return tuple(found)

    def encoded(self, text: str) -> bytes:
        """A text in which special tokens stand by their names, as `of` reads it."""
        parts = LarkWriter(self._vocabulary.special).split(text)
        return b"".join([part.encode() if i is None else self._names[i] for part, i in parts])

    def bytes_of(self, token_id: int) -> bytes:
        return self._names.get(token_id) or self._vocabulary.tokens[token_id]

    def beginnings(self, text: bytes) -> list[int]:
        """The tokens with which the text begins, one for each length."""
        if (special := _SPECIAL.match(text)) is not None:
            return [int(special.group(1))]
        sizes = range(1, min(self._longest, len(text)) + 1)
        return [i for size in sizes if (i := self._ids.get(text[:size])) is not None]

    def continuing(self) -> list[int]:
        """Tokens that do nothing but go on with a character that has begun."""
        if self._continuing is None:
            inner = bytes(range(0x80, 0xC0))
            self._continuing = [i for token, i in self._ids.items() if not token.strip(inner)]
        return self._continuing
