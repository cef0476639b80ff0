"""Keys that were dropped while moves were under way: what those moves bring of them counts no more.

Knows keys and numbers of moves.
"""

from collections.abc import Iterable

from duetto.scheduler.block_pool import BlockHash


class Forgotten:
    """As long as a move that was planned before the drop has no result."""

    def __init__(self) -> None:
        self._valid_from: dict[BlockHash, int] = {}  # moves from this one on; ascending
        self._all_valid_from = 0

    def __len__(self) -> int:
        return len(self._valid_from)

    def add(self, keys: Iterable[BlockHash], next_id: int) -> None:
        """What moves before `next_id` bring of these keys is not wanted."""
        for key in keys:
            self._valid_from.pop(key, None)  # or its place would be an earlier one
            self._valid_from[key] = next_id

    def add_all(self, next_id: int) -> None:
        """Nor of any key."""
        self._all_valid_from = next_id

    def is_wanted(self, key: BlockHash, move_id: int) -> bool:
        return move_id >= max(self._all_valid_from, self._valid_from.get(key, 0))

    def sweep(self, oldest_id: int) -> None:
        """All moves before this one have results."""
        while self._valid_from:
            key = next(iter(self._valid_from))
            if self._valid_from[key] > oldest_id:
                break
            del self._valid_from[key]
