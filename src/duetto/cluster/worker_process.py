"""The process of a worker: signals, an orderly end, and an end for want of an engine."""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

from duetto.cluster.worker import WorkerServer
from duetto.core.errors import ConfigError

logger = logging.getLogger(__name__)

FAILED_WORKER_EXIT_CODE = 70  # EX_SOFTWARE, as a server's: whoever supervises it starts it again
_LOOK_S = 0.5


class WorkerProcess:
    """Runs a worker on the main thread until it is told to end."""

    def __init__(
        self, server: WorkerServer, *, shutdown_timeout_s: float, join_timeout_s: float | None
    ) -> None:
        """`join_timeout_s`: how long it may wait for the first door; None: for ever."""
        self._server = server
        self._shutdown_timeout_s = shutdown_timeout_s
        self._join_timeout_s = join_timeout_s
        self._is_ending = threading.Event()
        self._num_signals = 0
        self._refusal: str | None = None
        self._unanswered = "no door has answered"
        self._has_failed = False
        server.on_failure = self._fail
        server.on_refused = self._refuse
        server.on_unanswered = self._note
        server.on_stop = self._is_ending.set

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or a door's word; then let running requests end; a second
        signal does not wait. The worker is started already.

        Raises ConfigError if a door refuses the worker, or the first one does not answer.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        give_up_at = time.monotonic() + (self._join_timeout_s or 0.0)
        while not self._is_ending.wait(_LOOK_S):
            if not self._server.is_reachable:
                self._fail("nobody can reach it any more")
            if self._join_timeout_s is None or self._server.num_joined:
                self._join_timeout_s = None
            elif time.monotonic() > give_up_at:
                self._refuse(self._unanswered)
        has_ended = self._server.leave(self._shutdown_timeout_s, lambda: self._num_signals > 1)
        for number in (signal.SIGINT, signal.SIGTERM):  # one that comes late kills nothing
            signal.signal(number, signal.SIG_IGN)
        if not has_ended:
            logger.error("the engine's last step has not ended in time; it is left behind")
        if self._refusal is not None:
            raise ConfigError(self._refusal)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._num_signals += 1
        what = "ending at once" if self._num_signals > 1 else "running requests may end"
        logger.info("%s: %s", signal.Signals(number).name, what)
        self._is_ending.set()

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        self._is_ending.set()

    def _note(self, reason: str) -> None:
        if reason != self._unanswered:
            logger.warning("%s", reason)
        self._unanswered = reason

    def _fail(self, reason: str) -> None:
        """On the watchdog's thread: a native call that hangs cannot be waited for."""
        logger.critical("the worker ends: %s", reason)
        logging.shutdown()
        sys.stderr.flush()
        os._exit(FAILED_WORKER_EXIT_CODE)
