"""Workers as child processes: started by their command, drained, ended, counted.

Knows no frames: a worker joins its router by itself, takes no more requests once it is told to end
(SIGTERM), and ends when those it has have ended.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from duetto.cluster.facts import WorkerRole

WorkerCommand = Callable[[WorkerRole], Sequence[str]]
DRAIN_S = 60.0  # that a worker has to answer what it has
_KILL_S = 5.0  # after which a process that does not end is left behind


def worker_command(arguments: Sequence[str]) -> WorkerCommand:
    """The command line of `duetto worker` with these arguments, for each role."""
    return lambda role: (sys.executable, "-m", "duetto", "worker", *arguments, "--role", role)


class WorkerChild:
    """One worker, as a child that ends with this process."""

    def __init__(self, command: Sequence[str]) -> None:
        tied = (sys.executable, "-m", "duetto.cluster.tied", str(os.getpid()))
        self._child = subprocess.Popen((*tied, *command), stdin=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def wait(self) -> int:
        """Until it has ended; its exit code."""
        return self._child.wait()

    def ask_to_end(self) -> None:
        """Take no more requests, and end with those there are."""
        self._child.terminate()

    def end(self, timeout_s: float) -> bool:
        """Wait until it has ended, and kill it after `timeout_s`; False if it had to be killed."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_KILL_S)
            return False
        return True


class LocalWorkers:
    """Workers on this machine. What has died is started again by the next `scale`. Replicas have
    the role `replica_role`: decode, if there may be prefill workers beside them."""

    def __init__(
        self,
        command: WorkerCommand,
        *,
        replica_role: WorkerRole = "both",
        drain_s: float = DRAIN_S,
    ) -> None:
        self._command = command
        self._drain_s = drain_s
        self._roles: tuple[WorkerRole, WorkerRole] = (replica_role, "prefill")
        self._workers: dict[WorkerRole, list[WorkerChild]] = {role: [] for role in self._roles}

    def scale(self, replicas: int, prefill: int) -> None:
        """The newest go first. New ones are started before old ones are drained."""
        wanted = dict(zip(self._roles, (replicas, prefill), strict=True))
        leaving: list[WorkerChild] = []
        for role, count in wanted.items():
            own = [worker for worker in self._workers[role] if worker.is_alive]
            own += [WorkerChild(self._command(role)) for _ in range(count - len(own))]
            self._workers[role] = own[:count]
            leaving += own[count:]
        self._drain(leaving)

    def live(self) -> tuple[int, int]:
        replicas, prefill = (
            sum(worker.is_alive for worker in self._workers[role]) for role in self._roles
        )
        return replicas, prefill

    def stop(self) -> None:
        self.scale(0, 0)

    def _drain(self, leaving: Sequence[WorkerChild]) -> None:
        for worker in leaving:
            worker.ask_to_end()
        for worker in leaving:
            worker.end(self._drain_s)
