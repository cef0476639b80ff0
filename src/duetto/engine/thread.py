"""One thread that owns an Engine. Standard library only.

Other threads send it messages, which it reads between steps, and it hands back one StepReport a
step. Knows no event loop, no HTTP and no scheduling; whoever listens brings `deliver`.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread, current_thread
from time import monotonic
from typing import Any, Protocol, TypeVar

from duetto.core.batch import RequestUpdate
from duetto.core.cache_control import CacheMessage, CacheReply
from duetto.core.errors import DeviceLost, EngineError, InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.engine.compute import Computing
from duetto.engine.engine import StepReport
from duetto.engine.handle import HUNG, STOPPED, Deliver, EngineOpener

logger = logging.getLogger(__name__)
T = TypeVar("T")

FAILED = "the engine failed and has stopped; the log of the server says why"


class SteppedEngine(Protocol):
    """What of an Engine the thread uses."""

    @property
    def has_work(self) -> bool: ...

    @property
    def computing(self) -> Computing | None: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> RequestUpdate | None: ...

    def step(self) -> StepReport: ...

    def control(self, message: CacheMessage) -> CacheReply: ...


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[], Any]
    future: Future[Any]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


@dataclass(frozen=True, slots=True)
class _Wake:
    pass


_Message = _Add | _Abort | _Call | _Stop | _Wake
_WAKE = _Wake()


def in_thread(engine: SteppedEngine, clock: Callable[[], float] = monotonic) -> EngineOpener:
    """An engine of this process, for a door. `clock` must be the engine's own."""
    return lambda deliver: EngineThread(engine, deliver, clock)


class EngineThread:
    """The handle of an engine in this process: runs it until it is stopped. Every request added
    gets exactly one final update.

    Any thread may call any method; none of them raises because of the engine. `deliver` is called
    on the engine's thread, and on the thread of a caller for what could no longer reach the engine.
    It must not block and must not call back.
    """

    def __init__(
        self,
        engine: SteppedEngine,
        deliver: Deliver,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._engine = engine
        self._hand_over = deliver
        self._clock = clock
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._lock = Lock()  # guards the four fields below
        self._live: set[str] = set()  # requests added that have had no final update
        self._ending: str | None = None  # why nothing more is accepted
        self._has_failed = False
        self._last_progress_time = clock()
        self._thread = Thread(target=self._run, name="duetto-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, request: Request) -> None:
        """Send a request to the engine. A refusal arrives as its final update, with an error."""
        with self._lock:
            refusal = self._ending
            if request.request_id in self._live:
                raise ValueError(f"request id {request.request_id} is in use")
            if not self._live:
                self._last_progress_time = self._clock()  # work begins now
            self._live.add(request.request_id)
        if refusal is None:
            self._inbox.put(_Add(request))
        else:
            self._deliver(StepReport((_ended(request.request_id, FinishReason.ERROR, refusal),)))

    def abort(self, request_id: str) -> None:
        """End a request in any state; one that is unknown or has ended is left alone."""
        self._inbox.put(_Abort(request_id))

    def wake(self) -> None:
        """Let the engine's thread look whether there is work, which another thread has left."""
        self._inbox.put(_WAKE)

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the engine's thread between two steps; it may touch the engine."""
        future: Future[T] = Future()
        with self._lock:
            refusal = self._ending
            if refusal is None:
                self._inbox.put(_Call(function, future))
        if refusal is not None:
            future.set_exception(EngineError(refusal))
        return future

    def control(self, message: CacheMessage) -> "Future[CacheReply]":
        """Send what a user asks of the KV cache; it is answered between two steps."""
        return self.call(lambda: self._engine.control(message))

    def stop(self, timeout: float) -> bool:
        """End live requests as aborted, end the thread; False if a step outlasts `timeout` seconds.

        Even then every request has had its final update, and the step's own is not delivered.
        """
        with self._lock:
            self._ending = self._ending or STOPPED
        self._inbox.put(_Stop())
        if self._thread.is_alive() and self._thread is not current_thread():
            self._thread.join(timeout)
        self._end_live(FinishReason.ABORT, STOPPED)
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """End live requests with an error and accept none, though the thread may hang in a step.

        If that step ever ends, so does the thread.
        """
        with self._lock:
            self._has_failed = True
            self._ending = self._ending or HUNG
        self._end_live(FinishReason.ERROR, HUNG)
        self._refuse_calls()

    @property
    def computing(self) -> Computing | None:
        return self._engine.computing

    @property
    def has_failed(self) -> bool:
        return self._has_failed

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._has_failed

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def last_progress_time(self) -> float:
        """When a step last computed or ended something, or when work began after idleness."""
        return self._last_progress_time

    # --- on the engine's thread --------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._has_failed and self._read_inbox():
                if self._engine.has_work:
                    self._deliver(self._engine.step())
            if not self._has_failed and self._engine.has_work:
                self._engine.step()  # nobody lives: what was dropped is to be forgotten on the disk
        except DeviceLost as error:
            logger.critical("%s", error)
            self._fail(str(error))
        except BaseException:  # a panic of a native library is not an Exception
            logger.exception("the engine thread ends: what it ran raised what it must not")
            self._fail(FAILED)
        self._refuse_calls()

    def _fail(self, message: str) -> None:
        with self._lock:
            self._has_failed = True
            self._ending = message
        self._end_live(FinishReason.ERROR, message)

    def _read_inbox(self) -> bool:
        """Handle all messages that wait, or wait for one if there is nothing else to do."""
        while True:
            try:
                # Blocking costs no processor time; a poll would steal it from the model.
                message = self._inbox.get(block=not self._engine.has_work)
            except Empty:
                return True
            match message:
                case _Add(request):
                    self._add(request)
                case _Abort(request_id):
                    self._abort(request_id, None)
                case _Call(function, future):
                    _fulfil(function, future)
                case _Wake():
                    pass
                case _Stop():
                    for request_id in self._live_ids():
                        self._abort(request_id, STOPPED)
                    return False

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except InvalidRequest as error:
            update = _ended(request.request_id, FinishReason.ERROR, str(error))
            self._deliver(StepReport((update,)))

    def _abort(self, request_id: str, error: str | None) -> None:
        update = self._engine.abort(request_id)
        if update is not None:
            self._deliver(StepReport((update._replace(error=update.error or error),)))

    def _refuse_calls(self) -> None:
        while True:
            try:
                message = self._inbox.get(block=False)
            except Empty:
                return
            if isinstance(message, _Call):
                message.future.set_exception(EngineError(self._ending or STOPPED))

    # --- the one way out ---------------------------------------------------------------------

    def _deliver(self, report: StepReport) -> None:
        """Pass on the updates of live requests only, so that no request ever ends twice."""
        with self._lock:
            updates = tuple(u for u in report.updates if u.request_id in self._live)
            self._live.difference_update(
                u.request_id for u in updates if u.finish_reason is not None
            )
            if report.record is not None or updates:
                self._last_progress_time = self._clock()
            record = report.record if self._ending is None else None
        if updates or record is not None:
            self._hand_over(StepReport(updates, record))

    def _live_ids(self) -> list[str]:
        with self._lock:
            return sorted(self._live)

    def _end_live(self, reason: FinishReason, error: str) -> None:
        updates = tuple(_ended(request_id, reason, error) for request_id in self._live_ids())
        try:
            self._deliver(StepReport(updates))
        except Exception:  # it may be the very cause of the failure that is being reported
            logger.exception("the last updates could not be delivered")


def _fulfil(function: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # it belongs to the caller, not to the engine
        future.set_exception(error)


def _ended(request_id: str, reason: FinishReason, error: str) -> RequestUpdate:
    return RequestUpdate(request_id, finish_reason=reason, error=error)
