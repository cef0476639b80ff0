"""How workers come to a router: from other processes, through a doorway, or from this one."""

from collections.abc import Callable
from threading import Condition
from typing import Protocol

from duetto.cluster.facts import WorkerFacts, why_not_together
from duetto.cluster.remote import RemoteEngine
from duetto.cluster.routed_worker import RoutedWorker
from duetto.cluster.router import RoutedEngine
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.engine.engine import StepReport
from duetto.engine.handle import EngineHandle, EngineOpener

WhyNot = Callable[[WorkerFacts], str | None]


class EventFollower(Protocol):
    """Who keeps the router's index of what workers have cached (cluster/events/subscriber.py)."""

    def joined(self, facts: WorkerFacts) -> None: ...

    def left(self, worker_id: str) -> None: ...


class RemoteMembers:
    """Lets a router use the workers of other processes (a remote.Dispatcher).

    The first one that comes says what the others must be like, and by whose prices is routed.
    """

    def __init__(
        self,
        make_router: Callable[[WorkerFacts], RoutedEngine],
        why_not: WhyNot = lambda _facts: None,
        follower: EventFollower | None = None,
    ) -> None:
        """`make_router` is called once. `why_not` says what else is wrong with a worker, beside
        what workers must agree on; `follower` is told of workers that come and go."""
        self._make_router = make_router
        self._router: RoutedEngine | None = None
        self._why_not = why_not
        self._follower = follower
        self._changed = Condition()  # told of each worker that comes or goes
        self._first: WorkerFacts | None = None

    @property
    def router(self) -> RoutedEngine:
        """Not to be asked before a worker has joined."""
        assert self._router is not None, "no worker has joined"
        return self._router

    @property
    def joined_workers(self) -> tuple[RoutedWorker, ...]:
        return () if self._router is None else self._router.workers

    @property
    def facts(self) -> WorkerFacts | None:
        """Of the first worker that ever came."""
        return self._first

    def wait(self, is_there: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for workers to come or go, until `is_there`; False if time is over."""
        with self._changed:
            return self._changed.wait_for(is_there, timeout_s)

    # --- as a dispatcher -----------------------------------------------------------------------

    def why_not(self, facts: WorkerFacts) -> str | None:
        reason = None if self._first is None else why_not_together(self._first, facts)
        return reason or self._why_not(facts)

    def joined(self, worker: RemoteEngine) -> None:
        if self._router is None:
            self._first, self._router = worker.facts, self._make_router(worker.facts)
        self._router.join(lambda number: RoutedWorker.of(worker.facts, number, worker))
        if self._follower is not None:
            self._follower.joined(worker.facts)
        with self._changed:
            self._changed.notify_all()

    def deliver(self, worker: RemoteEngine, report: StepReport) -> None:
        self.router.take(worker, report)

    def leaving(self, worker: RemoteEngine) -> None:
        self.router.leaving(worker)

    def lost(
        self, worker: RemoteEngine, _reason: str, unbegun: tuple[Request, ...]
    ) -> tuple[Request, ...]:
        """All are given back, to end with an error: the router sees that, and sends them to
        others where it may."""
        self.router.leave(worker)
        if self._follower is not None:
            self._follower.left(worker.facts.worker_id)
        with self._changed:
            self._changed.notify_all()
        return unbegun

    def not_taken(self, worker: RemoteEngine, request: Request, reason: str) -> bool:
        return self.router.not_taken(worker, request.request_id, reason)


def add_local(
    router: RoutedEngine, name: str, config: SchedulerConfig, open_engine: EngineOpener
) -> RoutedWorker:
    """An engine of this process as a worker; its handle is started by the caller."""
    known: list[EngineHandle] = []
    handle = open_engine(lambda report: router.take(known[0], report))
    known.append(handle)
    return router.join(lambda number: RoutedWorker(name, number, config, handle))
