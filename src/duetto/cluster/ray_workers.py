"""Workers under Ray: it places them on machines, and restarts those that end. Nothing else.

Each actor has one worker as its child, which joins its router by itself: no step and no token goes
through Ray, and a Ray that is down stops no worker from answering. Ray is an extra (duetto[ray]),
imported by name once it is used.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from threading import Thread
from typing import Any

from duetto.cluster.child_workers import DRAIN_S, WorkerChild, WorkerCommand
from duetto.cluster.facts import WorkerRole
from duetto.core.errors import DuettoError

_RAY = "ray"
PING_S = 10.0  # within which a healthy actor answers
START_S = 120.0  # for a place in the cluster


class RayError(DuettoError):
    """Ray is missing, or cannot do what is asked."""


def import_ray() -> Any:
    """The module. Raises RayError where it is not installed."""
    try:
        return import_module(_RAY)
    except ImportError as error:
        raise RayError(f"Ray cannot be imported ({error}); pip install 'duetto[ray]'") from None


class WorkerActor:
    """What Ray places: one worker, as its child. If the child ends by itself, so does the actor,
    and Ray starts another one."""

    def __init__(self, command: Sequence[str]) -> None:
        self._worker = WorkerChild(command)
        self._is_leaving = False
        Thread(target=self._follow, name="duetto-follow", daemon=True).start()

    def ping(self) -> int:
        """The worker's process."""
        return self._worker.pid

    def drain(self, timeout_s: float) -> bool:
        """Let the worker end what it has; False if it had to be killed."""
        self._is_leaving = True
        self._worker.ask_to_end()
        return self._worker.end(timeout_s)

    def check_health(self) -> None:
        """Raises RayError for a worker that has ended, as Ray Serve asks it."""
        if not self._worker.is_alive:
            raise RayError("the worker has ended")

    def _follow(self) -> None:
        self._worker.wait()
        if not self._is_leaving:
            os._exit(1)


class RayWorkers:
    """Workers as actors of a Ray cluster, `address` as ray.init has it. `num_cpus` and `num_gpus`
    are of each, by which Ray finds a place; `replica_role` is as LocalWorkers has it."""

    def __init__(
        self,
        command: WorkerCommand,
        *,
        replica_role: WorkerRole = "both",
        address: str | None = None,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._ray = import_ray()
        if not self._ray.is_initialized():
            try:
                self._ray.init(address=address, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RayError(f"no Ray cluster at {address or 'the default'}: {error}") from None
        self._command = command
        self._drain_s = drain_s
        self._actor = self._ray.remote(WorkerActor).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=-1, max_concurrency=2
        )
        self._roles: tuple[WorkerRole, WorkerRole] = (replica_role, "prefill")
        self._actors: dict[WorkerRole, list[Any]] = {role: [] for role in self._roles}

    def scale(self, replicas: int, prefill: int) -> None:
        """The newest go first. New ones are started before old ones are drained; Ray restarts
        those that died. Raises RayError if there is no place for a new one in time."""
        wanted = dict(zip(self._roles, (replicas, prefill), strict=True))
        leaving: list[Any] = []
        started: list[Any] = []
        for role, count in wanted.items():
            own = self._actors[role]
            new = [self._actor.remote(tuple(self._command(role))) for _ in range(count - len(own))]
            self._actors[role] = [*own, *new][:count]
            started += new
            leaving += own[count:]
        self._drain(leaving)
        placed = self._answering(started, START_S)
        missing = [actor for actor in started if actor not in placed]
        if missing:
            for role in wanted:
                self._actors[role] = [a for a in self._actors[role] if a not in missing]
            self._kill(missing)
            raise RayError(
                f"{len(missing)} of {len(started)} new workers found no place within "
                f"{START_S:.0f} s: ray status says what there is"
            )

    def live(self) -> tuple[int, int]:
        answering = self._answering([a for own in self._actors.values() for a in own], PING_S)
        replicas, prefill = (
            sum(actor in answering for actor in self._actors[role]) for role in self._roles
        )
        return replicas, prefill

    def stop(self) -> None:
        self.scale(0, 0)

    def _answering(self, actors: Sequence[Any], timeout_s: float) -> list[Any]:
        if not actors:
            return []
        asked = {actor.ping.remote(): actor for actor in actors}
        done, _ = self._ray.wait([*asked], num_returns=len(asked), timeout=timeout_s)
        return [asked[reply] for reply in done if self._has_succeeded(reply)]

    def _has_succeeded(self, reply: Any) -> bool:
        try:
            self._ray.get(reply, timeout=1.0)
        except self._ray.exceptions.RayError:
            return False
        return True

    def _drain(self, actors: Sequence[Any]) -> None:
        replies = [actor.drain.remote(self._drain_s) for actor in actors]
        if replies:
            self._ray.wait(replies, num_returns=len(replies), timeout=self._drain_s + PING_S)
        self._kill(actors)

    def _kill(self, actors: Sequence[Any]) -> None:
        for actor in actors:
            self._ray.kill(actor, no_restart=True)
