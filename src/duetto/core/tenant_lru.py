"""What is kept for several tenants in one bounded room, and what falls out of it.

Falls out: the least recently used of the tenant that holds the most, so that nobody's flood takes
what others have. Knows keys and sizes; not what they stand for.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")


class TenantLru(Generic[K]):
    """Keys with sizes, each a tenant's."""

    def __init__(self) -> None:
        self._sizes: dict[bytes, OrderedDict[K, int]] = {}  # by tenant; least recently used first
        self._totals: dict[bytes, int] = {}  # by tenant
        self._tenant_of: dict[K, bytes] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._tenant_of

    def __len__(self) -> int:
        return len(self._tenant_of)

    @property
    def total(self) -> int:
        """The sum of all sizes."""
        return sum(self._totals.values())

    def add(self, key: K, tenant: bytes, size: int = 1) -> None:
        """As the most recently used."""
        assert key not in self._tenant_of, "added twice"
        self._tenant_of[key] = tenant
        self._sizes.setdefault(tenant, OrderedDict())[key] = size
        self._totals[tenant] = self._totals.get(tenant, 0) + size

    def touch(self, key: K) -> None:
        """It was used."""
        self._sizes[self._tenant_of[key]].move_to_end(key)

    def remove(self, key: K) -> tuple[bytes, int]:
        """Returns whose it was, and its size."""
        tenant = self._tenant_of.pop(key)
        size = self._sizes[tenant].pop(key)
        self._totals[tenant] -= size
        if not self._sizes[tenant]:
            del self._sizes[tenant], self._totals[tenant]
        return tenant, size

    def victim(self) -> K | None:
        """What is to fall out next; None if nothing is there."""
        if not self._totals:
            return None
        most = max(self._totals, key=lambda tenant: (self._totals[tenant], tenant))
        return next(iter(self._sizes[most]))
