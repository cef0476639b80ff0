"""An engine in another process, as a door holds it.

A RemoteEngine is one worker from its joining to its end: a worker that comes back is another one,
with another worker_id. Knows frames; not which worker should get a request.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import Literal, Protocol

from duetto.cluster.connection import Connection
from duetto.cluster.control_frames import control_frame, error_in, reply_in
from duetto.cluster.facts import PROTOCOL, WorkerFacts
from duetto.cluster.frames import (
    Abort,
    ControlError,
    ControlReply,
    Frame,
    FrameError,
    Hello,
    Knock,
    Leaving,
    NotTaken,
    Refused,
    ReportFrame,
    Stop,
    Welcome,
    add_frame,
    encoded,
    facts_in,
    why_not_versions,
)
from duetto.cluster.machine import boot_id
from duetto.cluster.report_frames import report_in
from duetto.cluster.round_trip import RoundTrip
from duetto.core.batch import RequestUpdate
from duetto.core.cache_control import CacheMessage, CacheReply
from duetto.core.errors import EngineError
from duetto.core.request import FinishReason, Request
from duetto.engine.compute import Computing
from duetto.engine.engine import StepReport
from duetto.engine.handle import HUNG, STOPPED

logger = logging.getLogger(__name__)

MAX_QUESTIONS = 256  # of the KV cache, that a worker has not answered

WorkerState = Literal["new", "joined", "leaving", "lost"]


def worker_lost(name: str, reason: str) -> str:
    """What a request ends with whose worker is lost."""
    return f"the worker {name} was lost ({reason}); the request may be sent again"


class Dispatcher(Protocol):
    """Who decides over workers, as a router does. Called on the wire's thread, and on a caller's
    for what could not be sent; must not block. May call the RemoteEngine."""

    def why_not(self, facts: WorkerFacts) -> str | None:
        """Why a worker cannot serve here, with both values. Versions are compared already."""
        ...

    def joined(self, worker: "RemoteEngine") -> None:
        """It takes requests from now on."""
        ...

    def deliver(self, worker: "RemoteEngine", report: StepReport) -> None:
        """Of live requests only; in order; one final update for each request."""
        ...

    def leaving(self, worker: "RemoteEngine") -> None:
        """It takes no more requests; those that it has may end."""
        ...

    def lost(
        self, worker: "RemoteEngine", reason: str, unbegun: tuple[Request, ...]
    ) -> tuple[Request, ...]:
        """It is gone. Of `unbegun`, requests of which nothing was delivered, return those that
        shall end with an error; the others are the dispatcher's, and the worker's no more. What it
        had begun has ended with an error before."""
        ...

    def not_taken(self, worker: "RemoteEngine", request: Request, reason: str) -> bool:
        """The worker did not begin this request. True: it is the dispatcher's, to be sent
        elsewhere; False: it ends with an error."""
        ...


@dataclass(slots=True)
class _Sent:
    request: Request
    has_output: bool = False  # something of it was delivered
    is_aborted: bool = False

    @property
    def may_be_elsewhere(self) -> bool:
        return not (self.has_output or self.is_aborted)


class RemoteEngine:
    """The handle of an engine behind a connection. Every request added gets exactly one final
    update, unless the dispatcher takes it.

    Any thread may call any method; none blocks, none raises because of the worker.
    """

    def __init__(
        self,
        connection: Connection,
        dispatcher: Dispatcher,
        version: str,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._connection = connection
        self._dispatcher = dispatcher
        self._version = version
        self._clock = clock
        self._lock = Lock()  # guards the four fields below
        self._state: WorkerState = "new"
        self._why_lost = ""
        self._live: dict[str, _Sent] = {}
        self._questions: dict[int, Future[CacheReply]] = {}
        self._num_asked = 0
        self._has_one_clock = True  # with the worker: it is on this machine
        self._told_offset_s = 0.0
        self._facts: WorkerFacts | None = None
        self._last_progress_time = clock()
        self.on_over: Callable[[str, bool], None] = lambda _reason, _is_refused: None

    # --- what is known of it

    @property
    def facts(self) -> WorkerFacts:
        """What the worker said when it joined; not to be asked before."""
        assert self._facts is not None, "it has not joined"
        return self._facts

    @property
    def has_joined(self) -> bool:
        """Once, though it may be lost since."""
        return self._facts is not None

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def peer(self) -> str:
        """Its address, for people."""
        return self._connection.peer

    @property
    def round_trip(self) -> RoundTrip:
        return self._connection.round_trip

    @property
    def num_live(self) -> int:
        """Requests that it has, and that have had no final update."""
        return len(self._live)

    # --- the handle

    def start(self) -> None:
        """It runs already."""

    def add(self, request: Request) -> None:
        with self._lock:
            if request.request_id in self._live:
                raise ValueError(f"request id {request.request_id} is in use")
            if not self._live:
                self._last_progress_time = self._clock()
            state = self._state
            if state == "joined":
                self._live[request.request_id] = _Sent(request)
        if state != "joined":
            self._not_taken(request, self._why_lost or f"it is {state}")
            return
        offset = self._clock_offset()
        try:
            self._connection.send(add_frame(request, request.arrival_time + offset))
        except FrameError as error:
            self._end(request.request_id, FinishReason.ERROR, str(error))

    def abort(self, request_id: str) -> None:
        with self._lock:
            sent = self._live.get(request_id)
            if sent is None:
                return
            sent.is_aborted = True
        self._connection.send(encoded(Abort(request_id)))

    def control(self, message: CacheMessage) -> "Future[CacheReply]":
        future: Future[CacheReply] = Future()
        with self._lock:
            refusal = self._why_lost or None
            if refusal is None and len(self._questions) >= MAX_QUESTIONS:
                refusal = f"{MAX_QUESTIONS} questions wait for the worker's answer"
            self._num_asked += 1
            number = self._num_asked
            if refusal is None:
                self._questions[number] = future
        if refusal is None:
            try:
                self._connection.send(control_frame(number, message))
            except FrameError as error:
                refusal = str(error)
                self._questions.pop(number, None)
        if refusal is not None:
            future.set_exception(EngineError(refusal))
        return future

    def stop(self, timeout: float) -> bool:  # noqa: ARG002
        """End its live requests as aborted, and say goodbye: the worker may have other doors."""
        self._connection.close("the door ends")
        self._over(STOPPED, FinishReason.ABORT, STOPPED)
        return True

    def give_up(self) -> None:
        self._connection.close("the door gives up")
        self._over(HUNG, FinishReason.ERROR, HUNG)

    def stop_worker(self) -> None:
        """Tell the worker's process to end, as SIGTERM does."""
        self._connection.send(encoded(Stop()))

    @property
    def computing(self) -> Computing | None:
        """It is not seen from here; the worker has a watchdog of its own."""
        return None

    @property
    def has_failed(self) -> bool:
        return self._state == "lost"

    @property
    def is_alive(self) -> bool:
        return self._state in ("joined", "leaving")

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def last_progress_time(self) -> float:
        """When the worker was last heard: whether it computes is watched there, and it ends if it
        does not."""
        return max(self._last_progress_time, self._connection.last_heard)

    # --- on the wire's thread

    def knock(self, door: str) -> None:
        """Ask a worker that was called who it is."""
        self._connection.send(encoded(Knock(PROTOCOL, self._version, door)))

    def received(self, frame: Frame) -> None:
        match frame:
            case ReportFrame():
                self._report(report_in(frame, self._clock_offset()))
            case Hello() if self._state == "new":
                self._join(frame)
            case ControlReply(number):
                self._answer(number, reply_in(frame))
            case ControlError(number):
                self._answer(number, error_in(frame))
            case NotTaken(request_id, reason):
                self._give_back(request_id, reason)
            case Leaving() if self._state == "joined":
                self._state = "leaving"
                self._dispatcher.leaving(self)
            case Refused(reason):
                self._connection.close("refused")
                self.lost(reason, is_refused=True)
            case _:
                raise FrameError(f"a {type(frame).__name__} that no worker sends now")

    def lost(self, reason: str, *, is_refused: bool = False) -> None:
        name = self._connection.peer if self._facts is None else _name_of(self._facts, self.peer)
        error = worker_lost(name, reason)
        if self.has_joined and self._state != "lost":
            logger.warning(
                "the worker %s is lost (%s), with %d requests", name, reason, self.num_live
            )
        self._over(reason, FinishReason.ERROR, error, gives_back=True)
        self.on_over(reason, is_refused)

    def _join(self, frame: Hello) -> None:
        why_not = why_not_versions(frame.protocol, frame.version, self._version)
        if why_not is None:
            facts = facts_in(frame)
            why_not = self._dispatcher.why_not(facts)
        if why_not is not None:
            self._connection.send(encoded(Refused(why_not)))
            self._connection.close("refused")
            self.lost(why_not, is_refused=True)
            return
        self._facts = facts
        self._has_one_clock = frame.boot == boot_id()
        self._told_offset_s = frame.time - self._clock()  # until a round trip tells better
        self._connection.send(encoded(Welcome()))
        self._state = "joined"
        logger.info("the worker %s has joined", _name_of(facts, self.peer))
        self._dispatcher.joined(self)

    def _clock_offset(self) -> float:
        if self._has_one_clock:
            return 0.0
        trip = self._connection.round_trip
        return trip.clock_offset_s if trip.num_measured else self._told_offset_s

    def _report(self, report: StepReport) -> None:
        """Pass on what concerns live requests, so that none ends twice."""
        with self._lock:
            updates = tuple([u for u in report.updates if u.request_id in self._live])
            for update in updates:
                if update.finish_reason is not None:
                    self._live.pop(update.request_id, None)
                elif (sent := self._live.get(update.request_id)) is not None:
                    sent.has_output = True
            if self._state == "lost":
                return
        self._last_progress_time = self._clock()
        if updates or report.record is not None:
            self._dispatcher.deliver(self, StepReport(updates, report.record))

    def _answer(self, number: int, answer: "CacheReply | Exception") -> None:
        with self._lock:
            future = self._questions.pop(number, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _give_back(self, request_id: str, reason: str) -> None:
        with self._lock:
            sent = self._live.pop(request_id, None)
        if sent is None:
            return
        if sent.is_aborted:
            self._tell_ended(request_id, FinishReason.ABORT, None)
        elif sent.has_output:
            self._tell_ended(request_id, FinishReason.ERROR, reason)
        else:
            self._not_taken(sent.request, reason)

    # --- any thread

    def _not_taken(self, request: Request, reason: str) -> None:
        if not self._dispatcher.not_taken(self, request, reason):
            self._tell_ended(request.request_id, FinishReason.ERROR, reason)

    def _over(
        self, reason: str, finish_reason: FinishReason, error: str, *, gives_back: bool = False
    ) -> None:
        """Nothing comes any more: end all, or give back what was not begun."""
        with self._lock:
            if self._state == "lost":
                return
            self._state, self._why_lost = "lost", reason
            live, self._live = self._live, {}
            questions, self._questions = self._questions, {}
        back = [s.request for s in live.values() if gives_back and s.may_be_elsewhere]
        for request_id in sorted(live.keys() - {request.request_id for request in back}):
            why = FinishReason.ABORT if live[request_id].is_aborted else finish_reason
            self._tell_ended(request_id, why, error)
        for future in questions.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError(error))
        left: Iterable[Request] = back
        if self.has_joined:
            left = self._dispatcher.lost(self, reason, tuple(back))
        for request in left:
            self._tell_ended(request.request_id, finish_reason, error)

    def _end(self, request_id: str, reason: FinishReason, error: str) -> None:
        with self._lock:
            if self._live.pop(request_id, None) is None:
                return
        self._tell_ended(request_id, reason, error)

    def _tell_ended(self, request_id: str, reason: FinishReason, error: str | None) -> None:
        update = RequestUpdate(request_id, finish_reason=reason, error=error)
        self._dispatcher.deliver(self, StepReport((update,)))


def _name_of(facts: WorkerFacts, peer: str) -> str:
    return f"{facts.name}/{facts.worker_id[:8]} (process {facts.process}) at {peer}"
