"""What is known of the drafts of the requests that live, and of those of their tenants.

Knows no prices and no steps.
"""

from collections.abc import Sequence

from duetto.core.request import Request
from duetto.scheduler.acceptance import Acceptance, Pool

MAX_POOLS = 1024  # of tenants and proposers
MAX_WAIT = 4  # looks between two trials for a request whose trials fail


class Drafted:
    """One request's drafts."""

    __slots__ = (
        "acceptance",
        "acceptances",
        "asked",
        "drafts",
        "method",
        "num_learned",
        "tenant",
        "trial_in",
        "wait",
    )

    def __init__(self, tenant: bytes) -> None:
        self.tenant = tenant
        self.method = ""  # to be asked next; "" until one is chosen
        self.asked = ""  # the method that was asked last
        self.drafts: tuple[int, ...] = ()  # to be compared with what the step samples,
        self.acceptance: Acceptance | None = None  # and whose they are
        self.acceptances: dict[str, Acceptance] = {}
        self.num_learned = 0
        self.wait = self.trial_in = 1  # looks until the next trial

    def compare(self, tokens: Sequence[int]) -> int:
        """Its drafts with what was sampled, whether they were verified or not: how many were right.
        They are used up, and the next trial is sooner or later."""
        assert self.acceptance is not None
        num_right = self.acceptance.observe(self.drafts, tokens)
        self.drafts = ()
        self.num_learned += 1
        self.wait = 1 if num_right else min(2 * self.wait, MAX_WAIT)
        self.trial_in = min(self.trial_in, self.wait)
        return num_right


class DraftedRequests:
    """Bounded by the requests that live, and by MAX_POOLS."""

    def __init__(self) -> None:
        self._requests: dict[str, Drafted] = {}
        self._pools: dict[tuple[bytes, str], Pool] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, request: Request) -> Drafted | None:
        return self._requests.get(request.request_id)

    def of(self, request: Request) -> Drafted:
        """Made when first asked for."""
        found = self._requests.get(request.request_id)
        if found is None:
            found = self._requests[request.request_id] = Drafted(request.tenant)
        return found

    def acceptance(self, drafted: Drafted, method: str) -> Acceptance:
        found = drafted.acceptances.get(method)
        if found is None:
            pool = self.pool(drafted.tenant, method)
            found = drafted.acceptances[method] = Acceptance(pool)
        return found

    def pool(self, tenant: bytes, method: str) -> Pool:
        """Made when first asked for; of very many tenants the oldest is forgotten."""
        pool = self._pools.pop((tenant, method), None) or Pool()
        self._pools[tenant, method] = pool
        if len(self._pools) > MAX_POOLS:
            del self._pools[next(iter(self._pools))]
        return pool

    def forget(self, request: Request) -> None:
        self._requests.pop(request.request_id, None)
