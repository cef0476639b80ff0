"""Sets of strings that a text is compared with while it comes."""

import re
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise


class Words:
    """Strings of which the text at one place may be one; one may begin with another."""

    __slots__ = ("_complete", "_sorted")

    def __init__(self, words: Iterable[str]) -> None:
        self._complete = frozenset(words)
        self._sorted = sorted(self._complete)

    def __contains__(self, text: str) -> bool:
        return text in self._complete

    def may_become(self, text: str) -> bool:
        """Whether some word is longer than `text` and begins with it."""
        index = bisect_left(self._sorted, text)
        if text in self._complete:
            index += 1
        return index < len(self._sorted) and self._sorted[index].startswith(text)


class Markers:
    """Strings that are looked for in a text; none begins with another."""

    __slots__ = ("_longest", "_pattern", "_prefixes", "at_line_start", "names")

    def __init__(self, *names: str, at_line_start: Iterable[str] = ()) -> None:
        """Those of `at_line_start` count only where nothing but white space is before them."""
        self.at_line_start = frozenset(at_line_start)
        self.names = (*names, *sorted(self.at_line_start))
        for name, after in pairwise(["", *sorted(self.names)]):
            assert after and not (name and after.startswith(name)), name
        self._pattern = re.compile("|".join(map(re.escape, self.names)))
        self._prefixes = {name[:end] for name in self.names for end in range(1, len(name))}
        self._longest = max(map(len, self.names))

    def find(self, text: str, start: int) -> tuple[int, str] | None:
        found = self._pattern.search(text, start)
        return (found.start(), found.group()) if found else None

    def begun(self, text: str, start: int) -> int:
        """Where in `text` a marker may have begun whose rest has not come: len(text) if none."""
        end = len(text)
        for begin in range(max(start, end - self._longest + 1), end):
            if text[begin:] in self._prefixes:
                return begin
        return end
