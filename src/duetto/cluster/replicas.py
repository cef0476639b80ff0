"""The workers of a server as its children: each on its own processors, started again if it ends.

Knows no frames: workers join the server's router by themselves.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from threading import Event, Thread
from typing import NamedTuple

from duetto.cluster.facts import WorkerRole

logger = logging.getLogger(__name__)

FIRST_RESTART_S, LAST_RESTART_S = 1.0, 30.0  # from a worker's end until it is started again
MAX_FAILURES = 8  # in a row, after which it is not
LIVED_S = 60.0  # that a worker must live for its end to count as the first again
_LOOK_S = 0.1
_KILL_S = 5.0


class ReplicaPlan(NamedTuple):
    """One worker to be."""

    command: Sequence[str]
    role: WorkerRole
    cpus: frozenset[int] = frozenset()  # that it may use; none: those of this process


@dataclass(eq=False)
class _Replica:
    plan: ReplicaPlan
    child: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    num_failures: int = 0  # in a row
    restart_at: float | None = None  # None: it lives, or was given up


class Replicas:
    """Starts workers, and watches them until `stop`."""

    def __init__(
        self, plans: Sequence[ReplicaPlan], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._replicas = [_Replica(plan) for plan in plans]
        self._clock = clock
        self._is_stopping = Event()
        self._thread = Thread(target=self._watch, name="duetto-replicas", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Of those that were started last."""
        return [each.child.pid for each in self._replicas if each.child is not None]

    def start(self) -> None:
        for replica in self._replicas:
            self._start(replica)

    def why_not(self) -> str | None:
        """Which of the first ones has ended; to be asked until all have joined."""
        for number, replica in enumerate(self._replicas):
            code = None if replica.child is None else replica.child.poll()
            if code is not None:
                return f"worker {number} of {len(self._replicas)} has ended {_how(code)}"
        return None

    def keep(self) -> None:
        """From now on, who ends is started again."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Let all end what they have, and kill those that are too slow."""
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        children = [each.child for each in self._replicas if each.child is not None]
        for child in children:
            child.terminate()
        deadline = self._clock() + timeout_s
        for child in children:
            try:
                child.wait(max(0.0, deadline - self._clock()))
            except subprocess.TimeoutExpired:
                child.kill()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_KILL_S)

    def _start(self, replica: _Replica) -> None:
        tied = (sys.executable, "-m", "duetto.cluster.tied", str(os.getpid()))
        command = (*tied, *replica.plan.command)
        with _pinned(replica.plan.cpus):  # a child begins with what the thread has that starts it
            # A session of its own: Ctrl-C is for the server, which then ends its workers in order.
            replica.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, start_new_session=True
            )
        replica.started, replica.restart_at = self._clock(), None

    def _watch(self) -> None:
        while not self._is_stopping.wait(_LOOK_S):
            for number, replica in enumerate(self._replicas):
                self._look(number, replica)

    def _look(self, number: int, replica: _Replica) -> None:
        now = self._clock()
        if replica.restart_at is not None:
            if now >= replica.restart_at:
                self._start(replica)
            return
        child = replica.child
        code = None if child is None else child.poll()
        if code is None:
            return
        lived_s = now - replica.started
        replica.num_failures = 1 if lived_s >= LIVED_S else replica.num_failures + 1
        replica.child = None
        if replica.num_failures > MAX_FAILURES:
            logger.critical("worker %d ended %s, and is given up", number, _how(code))
            return
        delay_s = min(LAST_RESTART_S, FIRST_RESTART_S * 2 ** (replica.num_failures - 1))
        replica.restart_at = now + delay_s
        logger.error(
            "worker %d ended %s; it is started again in %.0f s", number, _how(code), delay_s
        )


@contextmanager
def _pinned(cpus: frozenset[int]) -> Iterator[None]:
    """Has the calling thread on some processors, for a while."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def shares_of_cpus(count: int) -> list[frozenset[int]]:
    """This process's processors, shared between so many workers: disjoint if there are enough, and
    none where the system cannot pin."""
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return [frozenset()] * count
    cpus = sorted(affinity(0))
    if count > len(cpus):
        return [frozenset([cpus[i % len(cpus)]]) for i in range(count)]
    ends = [i * len(cpus) // count for i in range(count + 1)]
    return [frozenset(cpus[start:end]) for start, end in pairwise(ends)]


def _how(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"
