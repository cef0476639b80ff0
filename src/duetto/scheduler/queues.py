"""Who waits, in which order, and who runs. Knows no blocks and no budget."""

from bisect import insort
from collections.abc import Iterator

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.scheduler.fairness import Turns
from duetto.scheduler.latency import QueueClock
from duetto.scheduler.policy import POLICIES, Chosen


class Queues:
    """The only writer of `waiting` and `running`; each live request is in one of them."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.waiting: list[Request] = []  # in the policy's order
        self.running: dict[str, Request] = {}  # admitted; holds room for all the tokens it has
        self.clock = QueueClock()
        self._config = config
        self._policy = POLICIES[config.scheduling_policy]
        self._chosen: Chosen = None  # who may be admitted; None: anyone
        self._turns = Turns(self._policy.level)

    def place(self, request: Request) -> tuple[float, int]:
        """A request's place in the policy's order; the smallest is first."""
        return self._policy.order(request, self._config), request.arrival_index

    def enqueue(self, request: Request) -> None:
        insort(self.waiting, request, key=self.place)
        self.clock.enter(request)

    def leave(self, request: Request, now: float) -> None:
        """A request waits no more."""
        self.waiting.remove(request)
        self.clock.leave(request, now)

    def run(self, request: Request, now: float) -> None:
        """A request that waits is admitted."""
        self.leave(request, now)
        self.running[request.request_id] = request
        self._turns.take(request)

    def stop(self, request: Request) -> None:
        """A request runs no more."""
        del self.running[request.request_id]
        self._turns.give_back(request)

    def choose(self, max_running: int) -> None:
        """Let the policy say who of those that wait may be admitted in this step."""
        num_running = len(self.running)
        self._chosen = self._policy.choose(self._chosen, self.waiting, num_running, max_running)

    def candidates(self) -> Iterator[Request]:
        """The waiting requests that may be admitted, in their order, clients by turns."""
        chosen = self._chosen
        return self._turns.in_order(
            [r for r in self.waiting if chosen is None or r.request_id in chosen]
        )

    def is_contended(self) -> bool:
        """Whether requests wait, and more than one client has some that wait or run."""
        return bool(self.waiting) and self._turns.is_contended(self.waiting)

    def in_the_way_of(self, request: Request) -> list[Request]:
        """Running requests of which one should give its place to `request`, which lacks one."""
        return self._turns.those_in_the_way(request, self.running.values())
