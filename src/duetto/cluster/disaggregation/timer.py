"""Wakes somebody when the next of some times has come. Knows nothing of what is late then."""

import heapq
from collections.abc import Callable
from threading import Condition, Thread
from time import monotonic


class WakeTimer:
    """A thread, once there is something to wait for. Times are of `monotonic`."""

    def __init__(self, wake: Callable[[], None], name: str) -> None:
        self._wake = wake
        self._times: list[float] = []
        self._changed = Condition()
        self._is_over = False
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def at(self, time: float) -> None:
        with self._changed:
            if not self._thread.is_alive() and not self._is_over:
                self._thread.start()
            heapq.heappush(self._times, time)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def _run(self) -> None:
        while self._wait():
            self._wake()

    def _wait(self) -> bool:
        """Until a time has come; False: until it was stopped."""
        with self._changed:
            while not self._is_over:
                now = monotonic()
                if self._times and self._times[0] <= now:
                    while self._times and self._times[0] <= now:
                        heapq.heappop(self._times)
                    return True
                self._changed.wait(self._times[0] - now if self._times else None)
            return False
