"""Whose request is next where several clients wait: they take turns.

    the client with the fewest running requests
    ... of those, the one whose last admission is the longest ago
    ... and of its requests, the first in the policy's order

Counts requests, not tokens: fair order by computed tokens, quotas and deadlines can take this
file's place. With one client nothing here changes anything. A policy without levels has no turns.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from duetto.core.request import Request

Level = Callable[[Request], int]  # clients take turns among requests of one level

MAX_REMEMBERED = 1024  # clients whose last turn is known; one that is not has had none


class Turns:
    """Written by the Scheduler only, as it admits requests and takes their places back."""

    def __init__(self, level: Level | None) -> None:
        self._level = level
        self._num_running: Counter[bytes] = Counter()
        self._last_turn: OrderedDict[bytes, int] = OrderedDict()
        self._num_turns = 0

    def take(self, request: Request) -> None:
        """A request is admitted: that was its client's turn."""
        self._num_running[request.tenant] += 1
        self._num_turns += 1
        self._last_turn[request.tenant] = self._num_turns
        self._last_turn.move_to_end(request.tenant)
        if len(self._last_turn) > MAX_REMEMBERED:
            self._last_turn.popitem(last=False)

    def give_back(self, request: Request) -> None:
        """A request has left its place."""
        self._num_running[request.tenant] -= 1
        if not self._num_running[request.tenant]:
            del self._num_running[request.tenant]

    def in_order(self, waiting: Sequence[Request]) -> Iterator[Request]:
        """Requests that wait in the policy's order, as they are to be admitted.

        Lazy: whoever is admitted between two of them counts for the second.
        """
        if self._level is None or not _has_several([r.tenant for r in waiting]):
            yield from list(waiting)
            return
        queues: dict[bytes, deque[tuple[int, Request]]] = {}
        for place, request in enumerate(waiting):
            queues.setdefault(request.tenant, deque()).append((place, request))
        while queues:
            tenant = self._next(queues, self._level)
            yield queues[tenant].popleft()[1]
            if not queues[tenant]:
                del queues[tenant]

    def is_contended(self, waiting: Sequence[Request]) -> bool:
        """Whether more than one client has requests that wait or run."""
        return _has_several([*self._num_running, *(r.tenant for r in waiting)])

    def those_in_the_way(self, request: Request, running: Iterable[Request]) -> list[Request]:
        """Running requests of which one should give its place to `request`, which lacks one.

        They are the client's with the most places, if it has two more than the request's own: so
        what is given is never claimed back, and each claim makes the shares more even. They are of
        its own level: one of another may be before it in the queue once it has given its place.
        """
        if self._level is None or not self._num_running:
            return []
        richest = max(self._num_running, key=self._num_running.__getitem__)
        if self._num_running[request.tenant] + 1 >= self._num_running[richest]:
            return []
        own = self._level(request)
        return [r for r in running if r.tenant == richest and self._level(r) == own]

    def _next(self, queues: dict[bytes, deque[tuple[int, Request]]], level: Level) -> bytes:
        """The client whose first request is next, of those of the level of the very first."""
        heads = {tenant: queue[0] for tenant, queue in queues.items()}
        best = level(min(heads.values())[1])

        def turn(tenant: bytes) -> tuple[int, int, int]:
            last = self._last_turn.get(tenant, 0)
            return self._num_running[tenant], last, heads[tenant][0]

        return min((t for t, (_, head) in heads.items() if level(head) == best), key=turn)


def _has_several(tenants: list[bytes]) -> bool:
    return bool(tenants) and tenants.count(tenants[0]) < len(tenants)
