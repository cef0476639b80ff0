"""Which pins live, which hashes they hold, and how much a tenant may keep.

Bounds, in blocks, shared ones counted once: a tenant keeps at most a quarter of the pool, all of
them together at most half of it, and never so much that a request of the longest context would not
fit beside it. What has a priority counts as what is pinned does. Knows no clock.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from duetto.core.cache_control import CachedText, KeptBlocks, PinQuotaExceeded
from duetto.core.config import SchedulerConfig
from duetto.scheduler.block_pool import PINNED, BlockHash

MAX_PINS = 256  # of one tenant
TENANT_SHARE, ALL_SHARE = 4, 2  # one part in so many of the pool


@dataclass(slots=True, eq=False)
class Hold:
    """A pin that lives."""

    tenant: bytes
    text: CachedText
    start: float
    priority: int | None = None  # None: pinned
    end: float | None = None
    number: int = field(init=False)  # the tenant's own count
    serial: int = field(init=False)  # of all pins

    @property
    def level(self) -> int:
        return PINNED if self.priority is None else self.priority


class Pins:
    """The writer of who holds what."""

    def __init__(self, config: SchedulerConfig) -> None:
        longest = config.num_blocks_for(config.context_length - 1)
        self.most = min(config.num_blocks // ALL_SHARE, config.num_blocks - longest)
        self.quota = min(config.num_blocks // TENANT_SHARE, self.most)
        self._of_tenant: dict[bytes, OrderedDict[int, Hold]] = {}  # by number, oldest first
        self._of_hash: dict[BlockHash, list[Hold]] = {}
        self._num_kept: Counter[bytes] = Counter()  # hashes by tenant
        self._num_made: Counter[bytes] = Counter()  # by tenant

    @property
    def live(self) -> list[Hold]:
        return [hold for holds in self._of_tenant.values() for hold in holds.values()]

    @property
    def num_live(self) -> int:
        return sum(map(len, self._of_tenant.values()))

    @property
    def hashes(self) -> list[BlockHash]:
        """Each once."""
        return list(self._of_hash)

    def of_tenant(self, tenant: bytes) -> list[Hold]:
        holds = self._of_tenant.get(tenant)
        return [] if holds is None else list(holds.values())

    def find(self, tenant: bytes, pin: int | CachedText) -> Hold | None:
        """A tenant's pin, by its number or its text."""
        if not isinstance(pin, CachedText):
            holds = self._of_tenant.get(tenant)
            return None if holds is None else holds.get(pin)
        for hold in self._of_hash.get(pin.hashes[-1], ()) if pin.hashes else ():
            if hold.tenant == tenant and len(hold.text.hashes) == len(pin.hashes):
                return hold
        return None

    def is_live(self, hold: Hold) -> bool:
        return self.find(hold.tenant, hold.number) is hold

    def is_held(self, block_hash: BlockHash) -> bool:
        return block_hash in self._of_hash

    def level(self, block_hash: BlockHash) -> int | None:
        """The highest that a pin wants for a hash; None if no pin holds it."""
        return max((hold.level for hold in self._of_hash.get(block_hash, ())), default=None)

    def usage(self, tenant: bytes) -> KeptBlocks:
        return KeptBlocks(self._num_kept[tenant], self.quota)

    def check_room(self, tenant: bytes, text: CachedText) -> None:
        """Raises PinQuotaExceeded, with the numbers, if a pin of this text would be too much."""
        own, size = self._num_kept[tenant], len(text.hashes)
        new = sum(not self._is_held_by(tenant, block_hash) for block_hash in text.hashes)
        asked = f"the text has {size} blocks, {new} of which are not kept so far; "
        if own + new > self.quota:
            words = f"{asked}with {own} that are, a client may keep {self.quota}"
            raise PinQuotaExceeded("pin", words)
        added = sum(block_hash not in self._of_hash for block_hash in text.hashes)
        if len(self._of_hash) + added > self.most:
            words = f"{asked}all clients together may keep {self.most}, and others keep too many"
            raise PinQuotaExceeded("pin", words)
        if len(self._of_tenant.get(tenant, ())) >= MAX_PINS:
            raise PinQuotaExceeded("pin", f"a client may have {MAX_PINS} pins")

    def begin(self, hold: Hold) -> None:
        """For who has asked `check_room`."""
        tenant = hold.tenant
        self._num_made[tenant] += 1
        hold.number, hold.serial = self._num_made[tenant], self._num_made.total()
        self._of_tenant.setdefault(tenant, OrderedDict())[hold.number] = hold
        for block_hash in hold.text.hashes:
            self._num_kept[tenant] += not self._is_held_by(tenant, block_hash)
            self._of_hash.setdefault(block_hash, []).append(hold)

    def end(self, hold: Hold) -> None:
        tenant = hold.tenant
        del self._of_tenant[tenant][hold.number]
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
        for block_hash in hold.text.hashes:
            self._of_hash[block_hash].remove(hold)
            self._num_kept[tenant] -= not self._is_held_by(tenant, block_hash)
            if not self._of_hash[block_hash]:
                del self._of_hash[block_hash]
        if not self._num_kept[tenant]:
            del self._num_kept[tenant]

    def check(self) -> None:
        """Assert that all counts agree, within the bounds."""
        of_hash: dict[BlockHash, list[Hold]] = {}
        for tenant, holds in self._of_tenant.items():
            assert holds and len(holds) <= MAX_PINS
            for number, hold in holds.items():
                assert (hold.tenant, hold.number) == (tenant, number)
                for block_hash in hold.text.hashes:
                    of_hash.setdefault(block_hash, []).append(hold)
            kept = {block_hash for hold in holds.values() for block_hash in hold.text.hashes}
            assert self._num_kept[tenant] == len(kept) <= self.quota, "a quota is exceeded"
        assert self._num_kept.keys() == self._of_tenant.keys()
        held = {block_hash: set(holds) for block_hash, holds in self._of_hash.items()}
        assert held == {h: set(holds) for h, holds in of_hash.items()}, "who holds a hash is off"
        assert len(of_hash) <= self.most, "all pins together keep too much"

    def _is_held_by(self, tenant: bytes, block_hash: BlockHash) -> bool:
        return any(hold.tenant == tenant for hold in self._of_hash.get(block_hash, ()))
