"""Which slots of the draft model's KV hold what they should: it checks itself.

The draft's arena has the target's blocks, by number. Nobody says when a block changes hands, so
each block is remembered with what was written: the tokens, and what they came after. What was
found valid for a request once is not read again: blocks that lose what they held are written down,
and a request looks at those since its last look.
"""

from collections.abc import Sequence
from itertools import islice

_MAX_CHANGES = 4096  # that are written down; who has not looked for longer reads all blocks again


class _Block:
    __slots__ = ("key", "place", "token_ids")

    def __init__(self, place: int, key: int) -> None:
        self.place = place  # in the tables of those whose KV it holds
        self.key = key  # of all tokens before the block
        self.token_ids: list[int] = []  # whose KV the first slots hold


class Chain:
    """One request's tokens in blocks, and what of their KV was found valid last."""

    __slots__ = ("highest", "keys", "num_changes", "num_full", "num_read", "table")

    def __init__(self) -> None:
        self.keys = [0]  # keys[i] stands for all tokens before block i
        self.table: Sequence[int] = ()  # at the last look
        self.num_full = 0  # blocks that were full and valid at the last look, from the first on
        self.num_changes = 0  # that there had been
        self.highest = self.num_read = 0  # of the token ids, among the first num_read

    def cut(self, num_tokens: int, block_size: int) -> None:
        """The tokens from num_tokens on are others now, or not known."""
        num_full = num_tokens // block_size
        del self.keys[num_full + 1 :]
        self.num_full = min(self.num_full, num_full)


class DraftKV:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[int, _Block] = {}
        self._changes: list[tuple[int, int]] = []  # of full blocks: place and number, in order
        self._num_forgotten = 0  # changes before those

    def extend_keys(self, keys: list[int], token_ids: Sequence[int]) -> None:
        """Blocks that are full have a next one, with its key."""
        size = self._block_size
        for block in range(len(keys) - 1, len(token_ids) // size):
            keys.append(hash((keys[-1], *token_ids[block * size : (block + 1) * size])))

    def num_valid(self, table: Sequence[int], chain: Chain, token_ids: Sequence[int]) -> int:
        """How many of the tokens, from the first on, have their KV. Reads what has changed since
        the last look, and what is new. `table` may grow afterwards, and not change."""
        self._take_changes(chain, table)
        size, num_tokens = self._block_size, len(token_ids)
        for place in range(chain.num_full, len(table)):
            block, start = self._blocks.get(table[place]), place * size
            if start >= num_tokens or block is None:
                return min(start, num_tokens)
            if block.key != chain.keys[place] or block.place != place:
                return start
            wanted = token_ids[start : start + size]
            if block.token_ids != wanted or len(wanted) < size:
                return start + _num_alike(block.token_ids, wanted)
            chain.num_full = place + 1
        return min(len(table) * size, num_tokens)

    def _take_changes(self, chain: Chain, table: Sequence[int]) -> None:
        """Lower what was found valid by what has changed since."""
        num_new = self._num_forgotten + len(self._changes) - chain.num_changes
        if num_new > len(self._changes):
            chain.num_full = 0
        else:
            for place, number in islice(self._changes, len(self._changes) - num_new, None):
                if place < chain.num_full and chain.table[place] == number:
                    chain.num_full = place
        # Numbers of blocks, compared in one go: to make the table takes longer.
        if chain.table[: chain.num_full] != table[: chain.num_full]:
            chain.num_full = _num_alike(chain.table[: chain.num_full], table)
        chain.table = table
        chain.num_changes = self._num_forgotten + len(self._changes)

    def write(
        self,
        table: Sequence[int],
        chain: Chain,
        token_ids: Sequence[int],
        start: int,
        end: int,
    ) -> None:
        """The KV of token_ids[start:end] is now there. All before `start` is valid."""
        size = self._block_size
        for place in range(start // size, -(-end // size)):
            number, first = table[place], max(start, place * size)
            self._note_change(number)
            if first == place * size:
                block = self._blocks[number] = _Block(place, chain.keys[place])
            else:
                block = self._blocks[number]
            del block.token_ids[first - place * size :]
            block.token_ids += token_ids[first : min(end, (place + 1) * size)]

    def forget(self, table: Sequence[int]) -> None:
        """What these blocks hold is not known any more."""
        for number in table:
            self._note_change(number)
            self._blocks.pop(number, None)

    def _note_change(self, number: int) -> None:
        """The block is about to lose something; of those that are not full nothing was kept."""
        block = self._blocks.get(number)
        if block is None or len(block.token_ids) < self._block_size:
            return
        self._changes.append((block.place, number))
        if len(self._changes) > _MAX_CHANGES:
            del self._changes[: _MAX_CHANGES // 2]
            self._num_forgotten += _MAX_CHANGES // 2


def _num_alike(some: Sequence[int], others: Sequence[int]) -> int:
    """How many are the same, from the first on."""
    for place, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return place
    return min(len(some), len(others))
