"""Free blocks, in the order in which they are taken. Knows no hashes and no owners."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

EMPTY = -2  # a level below every priority: what holds nothing that could be found goes first ...
OVER = -1  # ... then what was kept for a time that is over


class FreeBlocks:
    """The lowest level first, and of one level the least recently freed."""

    def __init__(self, blocks: Iterable[int]) -> None:
        self._level_of = dict.fromkeys(blocks, EMPTY)
        self._levels = {EMPTY: OrderedDict.fromkeys(self._level_of)}

    def __len__(self) -> int:
        return len(self._level_of)

    def __contains__(self, block: int) -> bool:
        return block in self._level_of

    def __iter__(self) -> Iterator[int]:
        for level in sorted(self._levels):
            yield from self._levels[level]

    def level(self, block: int) -> int:
        return self._level_of[block]

    def add(self, block: int, level: int, *, is_next: bool = False) -> None:
        """A block is free from now on; `is_next`: it is the next to be taken of its level."""
        self._level_of[block] = level
        blocks = self._levels.get(level)
        if blocks is None:
            blocks = self._levels[level] = OrderedDict()
        blocks[block] = None
        if is_next:
            blocks.move_to_end(block, last=False)

    def discard(self, block: int) -> None:
        """A block is free no longer, if it was."""
        level = self._level_of.pop(block, None)
        if level is not None:
            del self._levels[level][block]
            self._drop_if_empty(level)

    def take(self) -> tuple[int, int]:
        """The next block, which is free no longer, and its level."""
        level = min(self._levels)
        block, _ = self._levels[level].popitem(last=False)
        del self._level_of[block]
        self._drop_if_empty(level)
        return block, level

    def _drop_if_empty(self, level: int) -> None:
        if not self._levels[level]:
            del self._levels[level]
