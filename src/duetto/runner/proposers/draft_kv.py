"""Which slots of the draft model's KV hold what they should: it checks itself.

The draft's arena has the target's blocks, by number. Nobody says when a block changes hands, so
each block is remembered with what was written: the tokens, and what they came after.
"""

from collections.abc import Sequence


class _Block:
    __slots__ = ("key", "token_ids")

    def __init__(self, key: int) -> None:
        self.key = key  # of all tokens before the block
        self.token_ids: list[int] = []  # whose KV the first slots hold


class DraftKV:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[int, _Block] = {}

    def extend_keys(self, keys: list[int], token_ids: Sequence[int]) -> None:
        """keys[i] stands for all tokens before block i; blocks that are full have a next one."""
        size = self._block_size
        if not keys:
            keys.append(0)
        for block in range(len(keys) - 1, len(token_ids) // size):
            keys.append(hash((keys[-1], *token_ids[block * size : (block + 1) * size])))

    def num_valid(self, table: Sequence[int], keys: Sequence[int], token_ids: Sequence[int]) -> int:
        """How many of the tokens, from the first on, have their KV."""
        size = self._block_size
        for place, number in enumerate(table):
            block = self._blocks.get(number)
            start = place * size
            if start >= len(token_ids) or block is None or block.key != keys[place]:
                return min(start, len(token_ids))
            wanted = token_ids[start : start + size]
            if block.token_ids == wanted and len(wanted) == size:
                continue
            alike = 0
            for have, want in zip(block.token_ids, wanted, strict=False):
                if have != want:
                    break
                alike += 1
            if alike < size:
                return start + alike
        return min(len(table) * size, len(token_ids))

    def write(
        self,
        table: Sequence[int],
        keys: Sequence[int],
        token_ids: Sequence[int],
        start: int,
        end: int,
    ) -> None:
        """The KV of token_ids[start:end] is now there. All before `start` is valid."""
        size = self._block_size
        for place in range(start // size, -(-end // size)):
            first = max(start, place * size)
            if first == place * size:
                block = self._blocks[table[place]] = _Block(keys[place])
            else:
                block = self._blocks[table[place]]
            del block.token_ids[first - place * size :]
            block.token_ids += token_ids[first : min(end, (place + 1) * size)]

    def forget(self, table: Sequence[int]) -> None:
        """What these blocks hold is not known any more."""
        for number in table:
            self._blocks.pop(number, None)
