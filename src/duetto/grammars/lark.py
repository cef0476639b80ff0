"""Writes grammars in Lark's notation, as llguidance reads it.

Everything that callers bring becomes a literal, a regex or a schema, whose text cannot leave its
place: what is written here alone decides the rules. Knows no constraint.
"""

import json
import re
from collections.abc import Mapping, Sequence

ANY_TEXT = "/(?s:.*)/"
SOME_TEXT = "/(?s:.+)/"
# Where only one text may follow, each token that begins it may: a mask is what the grammar allows,
# and no question of how a tokenizer would cut it.
_OPTIONS = '%llguidance {"no_forcing": true}'


class LarkWriter:
    """Rules, one after another. Each method adds what it needs, and returns the expression that
    stands for it in other rules."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """`special`: tokens that are no text."""
        self._special = special
        # The longest first, as one may begin with another.
        names = sorted(special, key=lambda name: (-len(name), name))
        self._is_special = re.compile("|".join(map(re.escape, names))) if names else None
        self._rules: list[str] = []
        self._names: dict[str, str] = {}  # of rules by what they are
        self._inner: list[dict[str, str]] = []  # whole grammars, with names

    def text(self, start: str) -> str:
        """The grammar whose start is an expression."""
        lark = "\n".join([_OPTIONS, f"start: {start}", *self._rules]) + "\n"
        grammars = [{"name": "outer", "lark_grammar": lark}, *self._inner]
        return json.dumps({"grammars": grammars}, ensure_ascii=False)

    def literal(self, text: str) -> str:
        """A text, in which special tokens are spelt out."""
        parts = [quoted(part) if i is None else f"<[{i}]>" for part, i in self.split(text)]
        return " ".join(parts) or '""'

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """A text as parts, each with its id if it is a special token."""
        if self._is_special is None:
            return [(text, None)] if text else []
        parts: list[tuple[str, int | None]] = []
        start = 0
        for found in self._is_special.finditer(text):
            if found.start() > start:
                parts.append((text[start : found.start()], None))
            parts.append((found.group(), self._special[found.group()]))
            start = found.end()
        if start < len(text):
            parts.append((text[start:], None))
        return parts

    def rule(self, body: str, options: str = "") -> str:
        """A rule of its own; the same one twice is one."""
        body = f"{options}: {body}"
        name = self._names.get(body)
        if name is None:
            name = self._names[body] = f"r{len(self._names)}"
            self._rules.append(f"{name}{body}")
        return name

    def regex(self, pattern: str) -> str:
        return self.rule(regex_literal(pattern))

    def schema(self, text: str) -> str:
        """JSON, by the text of a schema."""
        return self.rule(f"%json {text}")

    def inner(self, lark: str) -> str:
        """A grammar whose rules are its own."""
        name = f"inner{len(self._inner)}"
        self._inner.append({"name": name, "lark_grammar": f"{_OPTIONS}\n{lark}"})
        return f"@{name}"

    def one_of(self, expressions: Sequence[str]) -> str:
        return expressions[0] if len(expressions) == 1 else "(" + " | ".join(expressions) + ")"

    def until(self, marker: str) -> str:
        """Any text up to the first `marker`, and that."""
        first, *rest = self.split(marker)
        text, token_id = first
        if token_id is not None:  # no text holds it
            return f"{self.any_text()} {self.literal(marker)}"
        head = self.rule(f"{ANY_TEXT} {quoted(text)}", "[lazy]")
        return " ".join([head, *(self.literal(part) for part, _ in rest)])

    def any_text(self) -> str:
        return self.rule(ANY_TEXT)

    def anything(self) -> str:
        """Any text, and tokens that are none among it. Those that end a text end it."""
        if not self._special:
            return self.any_text()
        ids = ",".join(map(str, sorted(self._special.values())))
        return f"({self.rule(SOME_TEXT)} | <[{ids}]>)*"


def quoted(text: str) -> str:
    """A literal."""
    return json.dumps(text)


def regex_literal(pattern: str) -> str:
    """A regex between slashes. Anchors at both its ends say what is so anyway."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and not _is_escaped(pattern, len(pattern) - 1):
        pattern = pattern[:-1]
    # A slash that no backslash stands before would end it; and a line must not end within it.
    shown = []
    for i, character in enumerate(pattern):
        if character == "/" and not _is_escaped(pattern, i):
            shown.append("\\")
        shown.append({"\n": "\\n", "\r": "\\r"}.get(character, character))
    return f"/{''.join(shown)}/"


def _is_escaped(pattern: str, at: int) -> bool:
    """Whether an odd number of backslashes stands before it."""
    before = pattern[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
