"""The responses that clients may ask for again, or go on from: bounded, and each tenant's own.

In memory alone: a restart forgets them, as does the time, and what is stored later. Knows no HTTP.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from duetto.server.http.json_parts import Json, encode


@dataclass(frozen=True, slots=True)
class Stored:
    body: Json
    messages: Sequence[Json]  # the conversation up to and with it, without instructions
    input_items: Sequence[Json]
    num_bytes: int
    time: float


class ResponseStore:
    """Least recently used first out, of the tenant that holds the most. Any thread may ask."""

    def __init__(
        self, max_bytes: int, ttl_s: float, clock: Callable[[], float], max_per_tenant: int = 1000
    ) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._max_per_tenant = max_per_tenant
        self._lock = Lock()
        self._tenants: dict[bytes, OrderedDict[str, Stored]] = {}
        self._num_bytes: dict[bytes, int] = {}

    def put(
        self, tenant: bytes, body: Json, messages: Sequence[Json], input_items: Sequence[Json]
    ) -> bool:
        """Keep it; False if it is larger than a quarter of all that may be kept."""
        size = len(encode([body, [*messages], [*input_items]]))
        if size > self._max_bytes // 4:
            return False
        with self._lock:
            self._put(tenant, body, messages, input_items, size)
        return True

    def get(self, tenant: bytes, response_id: str) -> Stored | None:
        with self._lock:
            return self._get(tenant, response_id)

    def delete(self, tenant: bytes, response_id: str) -> bool:
        with self._lock:
            if self._get(tenant, response_id) is None:
                return False
            self._drop(tenant, response_id)
            return True

    def _put(
        self,
        tenant: bytes,
        body: Json,
        messages: Sequence[Json],
        input_items: Sequence[Json],
        size: int,
    ) -> None:
        stored = Stored(body, messages, input_items, size, self._clock())
        own = self._tenants.setdefault(tenant, OrderedDict())
        own[body["id"]] = stored
        self._num_bytes[tenant] = self._num_bytes.get(tenant, 0) + size
        while len(own) > self._max_per_tenant:
            self._drop(tenant, next(iter(own)))
        while sum(self._num_bytes.values()) > self._max_bytes:
            largest = max(self._num_bytes, key=lambda each: self._num_bytes[each])
            self._drop(largest, next(iter(self._tenants[largest])))

    def _get(self, tenant: bytes, response_id: str) -> Stored | None:
        own = self._tenants.get(tenant, OrderedDict())
        stored = own.get(response_id)
        if stored is None:
            return None
        if self._clock() - stored.time > self._ttl_s:
            self._drop(tenant, response_id)
            return None
        own.move_to_end(response_id)
        return stored

    def _drop(self, tenant: bytes, response_id: str) -> None:
        self._num_bytes[tenant] -= self._tenants[tenant].pop(response_id).num_bytes
        if not self._tenants[tenant]:
            del self._tenants[tenant], self._num_bytes[tenant]
