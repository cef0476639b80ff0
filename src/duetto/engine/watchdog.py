"""Watches an engine's thread from another one: has it ended, or does a step take far too long?

A native call that hangs cannot be ended, so all that can be done is to say so. Time counts only
while the watch itself runs: a process that was stopped (SIGSTOP, a debugger, a laptop asleep) is
not taken for one that hangs. Standard library only; knows no scheduling and no HTTP.
"""

import logging
from collections.abc import Callable
from threading import Event, Thread
from time import monotonic
from typing import Literal, Protocol

from duetto.engine.compute import Computing

logger = logging.getLogger(__name__)

StepTimeout = float | Literal["auto", "off"]  # seconds

TICK_S = 0.25  # between two looks
MAX_TICK_S = 2 * TICK_S  # that one look counts: what was longer, the watch did not run itself
TIMES_PREDICTED = 10.0  # that a step may take, as long as its prediction
LEAST_S = 10.0  # that any step may take
LEAST_UNMEASURED_S = 120.0  # ... of a size of which no step was measured: its price is a guess


class Watched(Protocol):
    """What of an EngineThread is watched. Any thread may ask."""

    @property
    def has_failed(self) -> bool: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def last_progress_time(self) -> float: ...

    @property
    def computing(self) -> Computing | None: ...


def time_limit_s(computing: Computing, timeout: StepTimeout) -> float:
    """Seconds after which a computation counts as hung."""
    if timeout == "off":
        return float("inf")
    if timeout != "auto":
        return timeout
    least = LEAST_S if computing.is_measured else LEAST_UNMEASURED_S
    return max(least, TIMES_PREDICTED * (computing.predicted_s or 0.0))


class Watchdog:
    """Looks at a thread a few times a second, and tells once that it has failed."""

    def __init__(
        self,
        watched: Watched,
        on_failure: Callable[[str], None],
        *,
        step_timeout_s: StepTimeout = "auto",
        stall_timeout_s: float = 120.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`on_failure` is called on the watchdog's thread, with what is wrong.

        stall_timeout_s: how long there may be work, nothing being computed and no progress.
        """
        self.failure: str | None = None
        self._watched = watched
        self._on_failure = on_failure
        self._step_timeout = step_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._last_look = clock()
        self._seen: object = None  # what was going on at the last look ...
        self._seen_s = 0.0  # ... and for how long
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="duetto-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> str | None:
        """What is wrong, or None."""
        now = self._clock()
        passed_s, self._last_look = min(now - self._last_look, MAX_TICK_S), now
        watched, computing = self._watched, self._watched.computing
        if watched.has_failed:
            return "the engine's thread has ended"
        seen: object = computing
        if computing is None:
            seen = ("idle between steps", watched.last_progress_time)
        if not watched.has_work or seen != self._seen:
            self._seen, self._seen_s = seen, 0.0
            return None
        self._seen_s += passed_s
        if computing is not None:
            return self._judge_step(computing)
        if self._seen_s > self._stall_timeout_s:
            return f"there is work, and nothing was computed for {self._seen_s:.0f} s"
        return None

    def _judge_step(self, computing: Computing) -> str | None:
        limit_s = time_limit_s(computing, self._step_timeout)
        if self._seen_s <= limit_s:
            return None
        predicted = computing.predicted_s
        told = "nothing" if predicted is None else f"{predicted:.3g} s"
        return (
            f"a step of {computing.num_requests} requests has taken {self._seen_s:.1f} s; "
            f"{told} was predicted, {limit_s:.3g} s is the limit (--step-timeout-s)"
        )

    def _run(self) -> None:
        while not self._stopped.wait(TICK_S):
            failure = self.look()
            if failure is not None:
                self.failure = failure
                logger.critical("%s", failure)
                self._on_failure(failure)
                return
