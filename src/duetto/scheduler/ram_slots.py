"""Which slot of the RAM tier holds which block. Knows keys and slots; no bytes and no moves.

A slot is free, on its way (taken, and its content is not there yet), or holds one key. A key that
is held for somebody, or used by a step that is being planned, does not fall out.
"""

from collections import Counter
from collections.abc import Iterable

from duetto.core.tenant_lru import TenantLru
from duetto.scheduler.block_pool import BlockHash


class RamSlots:
    """`num_slots` slots of a block each."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = [*range(num_slots)]
        self._slot_of: dict[BlockHash, int] = {}
        self._tenant_of: dict[BlockHash, bytes] = {}
        self._idle = TenantLru[BlockHash]()  # those that may fall out
        self._holds: Counter[BlockHash] = Counter()  # of keys that are there or not

    def __contains__(self, key: BlockHash) -> bool:
        return key in self._slot_of

    @property
    def num_held(self) -> int:
        """Keys held, there or not."""
        return len(self._holds)

    def slot(self, key: BlockHash) -> int:
        return self._slot_of[key]

    def take(self) -> int | None:
        """A free slot, which is on its way from now on."""
        return self._free.pop() if self._free else None

    def victim(self) -> BlockHash | None:
        """The key that is to fall out next."""
        return self._idle.victim()

    def drop(self, key: BlockHash) -> bytes:
        """It is there no more, and its slot is free. Returns whose it was."""
        if key in self._idle:
            self._idle.remove(key)
        self._free.append(self._slot_of.pop(key))
        return self._tenant_of.pop(key)

    def give_back(self, slot: int) -> None:
        """A slot that was on its way is free: nothing came."""
        self._free.append(slot)

    def put(self, key: BlockHash, slot: int, tenant: bytes) -> None:
        """What was on its way is there."""
        if key in self._slot_of:  # it came twice
            self._free.append(slot)
            return
        self._slot_of[key] = slot
        self._tenant_of[key] = tenant
        if key not in self._holds:
            self._idle.add(key, tenant)

    def touch(self, key: BlockHash) -> None:
        """It was used."""
        if key in self._idle:
            self._idle.touch(key)

    def hold(self, keys: Iterable[BlockHash]) -> None:
        for key in keys:
            self._holds[key] += 1
            if key in self._idle:
                self._idle.remove(key)

    def let_go(self, keys: Iterable[BlockHash]) -> None:
        """The opposite of `hold`; they count as used now."""
        for key in keys:
            self._holds[key] -= 1
            if self._holds[key]:
                continue
            del self._holds[key]
            if key in self._slot_of:
                self._idle.add(key, self._tenant_of[key])

    def forget_all(self) -> None:
        for key in [*self._slot_of]:
            self.drop(key)

    def check(self, slots_on_their_way: list[int]) -> None:
        """Assert that each slot is in one state, and that what may fall out is not held."""
        slots = [*self._free, *self._slot_of.values(), *slots_on_their_way]
        assert sorted(slots) == [*range(self.num_slots)], "a slot is lost, or stands twice"
        assert self._tenant_of.keys() == self._slot_of.keys()
        for key in self._slot_of:
            assert (key in self._idle) != (key in self._holds), "held and idle, or neither"
        assert len(self._idle) <= len(self._slot_of)
