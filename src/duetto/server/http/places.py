"""The places of requests that run or wait, and how many of them one client may hold.

A client is an API key or, where there are none, an address. Knows no engine and no text.
"""

from collections import Counter, deque
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from math import ceil

from starlette.types import Scope

from duetto.server.http.errors import RETRY_AFTER_S, ApiError, overloaded

ASKING_S = 30.0  # a client that asked so lately counts as one that asks
MAX_RETRY_AFTER_S = 60
NUM_REMEMBERED_ENDS = 64


def client_of(scope: Scope) -> bytes:
    """Whose request this is: the digest of its key, else the address at the other end.

    Of an IPv6 address the first 64 bits, which are one network's: whoever has one has all the rest.
    X-Forwarded-For and the like are not read, as anybody can write them: behind a proxy and
    without keys, all are one client.
    """
    tenant: bytes = scope.get("state", {}).get("tenant", b"")
    if tenant or not scope.get("client"):
        return tenant
    host = str(scope["client"][0])
    try:
        address = ip_address(host)
    except ValueError:  # no address, but a name of the server's own
        return host.encode()
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return address.packed[:8] if mapped is None else mapped.packed
    return address.packed


class Places:
    """All methods run on the event loop."""

    def __init__(self, max_running: int, max_waiting: int, clock: Callable[[], float]) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._clock = clock
        self._held: Counter[bytes] = Counter()  # by client; running, waiting and being read
        self._started: Counter[bytes] = Counter()  # of those, seen in a step
        self._last_client: bytes | None = None
        self._last_time = self._other_time = float("-inf")  # of the last ask; of another's
        self._ends: deque[float] = deque(maxlen=NUM_REMEMBERED_ENDS)

    @property
    def num_held(self) -> int:
        return self._held.total()

    def ask(self, client: bytes, count: int) -> None:
        """Raises ApiError if `client` may not have `count` more places. Takes none.

        429: while others ask, at most half of the places to wait are one client's. 503: all are
        taken. What a client holds beyond its half, since it was alone, is not held against others:
        so at most one and a half times as many wait as there are places.
        """
        self._note(client)
        half = ceil(self._max_waiting / 2)
        waiting = self._num_waiting(client, count)
        if waiting > half and self._others_ask(client):
            raise self._too_many(count, waiting - half, half)
        excess = sum(max(0, self._num_waiting(c) - half) for c in self._held if c != client)
        if self.num_held - excess + count > self._max_running + self._max_waiting:
            raise overloaded(f"{self.num_held} requests are running or waiting; try again later")

    def take(self, client: bytes, count: int) -> None:
        self._held[client] += count

    def start(self, client: bytes) -> None:
        """One of its requests that were taken runs."""
        self._started[client] += 1

    def give_back(self, client: bytes, count: int, *, has_started: bool = False) -> None:
        self._held[client] -= count
        if has_started:
            self._started[client] -= count
            self._ends.append(self._clock())
        if not self._held[client]:
            del self._held[client], self._started[client]

    def _num_waiting(self, client: bytes, more: int = 0) -> int:
        """How many of a client's requests wait, if it had `more`: those that cannot run, or were
        not seen to. A step tells only at its end who runs in it."""
        held = self._held[client] + more
        may_run = self._max_running - (self.num_held - self._held[client])
        return max(0, held - max(self._started[client], may_run))

    def _note(self, client: bytes) -> None:
        if client != self._last_client:
            self._last_client, self._other_time = client, self._last_time
        self._last_time = self._clock()

    def _others_ask(self, client: bytes) -> bool:
        """`client` is the last that asked."""
        is_alone = self.num_held == self._held[client]
        return not is_alone or self._clock() - self._other_time <= ASKING_S

    def _too_many(self, count: int, excess: int, half: int) -> ApiError:
        return ApiError(
            429,
            f"{count} more would be {excess} too many of one client's: while others ask, it may "
            f"have {half} of the {self._max_waiting} places to wait; try again later",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(self._retry_after_s(excess))},
        )

    def _retry_after_s(self, count: int) -> int:
        """About when `count` requests will have ended, by how fast the last ones did."""
        passed_s = self._clock() - self._ends[0] if self._ends else 0.0
        if not passed_s > 0:
            return RETRY_AFTER_S
        seconds = ceil(count * passed_s / len(self._ends))
        return min(max(seconds, RETRY_AFTER_S), MAX_RETRY_AFTER_S)
