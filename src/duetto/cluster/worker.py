"""A worker: an engine, and the doors that send it requests.

It listens for doors, or joins those whose addresses it has. What a door sends is checked again
here: nobody else stands between it and the engine. Knows frames and the engine's handle; not what
the engine computes with.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from time import monotonic

from duetto.cluster.address import WireAddress
from duetto.cluster.connection import Connection, ConnectionUser
from duetto.cluster.control_frames import message_in, reply_frame
from duetto.cluster.facts import WorkerFacts
from duetto.cluster.frames import (
    MAX_ID,
    Abort,
    AddRequest,
    Control,
    Frame,
    FrameError,
    Knock,
    Leaving,
    NotTaken,
    Refused,
    Stop,
    Welcome,
    encoded,
    hello,
    why_not_versions,
)
from duetto.cluster.machine import boot_id
from duetto.cluster.report_frames import report_frames
from duetto.cluster.sockets import BoundSocket
from duetto.cluster.wire import Wire
from duetto.core.batch import RequestUpdate
from duetto.core.cache_control import CacheReply
from duetto.core.errors import InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.engine.engine import StepReport
from duetto.engine.handle import EngineHandle, EngineOpener
from duetto.engine.intake import check_prompt
from duetto.engine.watchdog import StepTimeout, Watchdog

logger = logging.getLogger(__name__)

MAX_LIVE = 8192  # requests of one door
MAX_QUESTIONS_HERE = 1024  # of one door, about the KV cache, that are not answered
FIRST_JOIN_S, LAST_JOIN_S = 0.2, 5.0  # until a door that does not answer is tried again
FLUSH_S = 1.0  # for the last updates to leave


@dataclass(eq=False)
class _Door:
    """A door, as its connection's user. Its methods are called on the wire's thread."""

    worker: "WorkerServer"
    connection: Connection
    address: WireAddress | None = None  # that was joined; None: it came to us
    is_welcome: bool = False
    why_refused: str | None = None
    num_questions: int = 0
    live: set[str] = field(default_factory=set)  # guarded by the worker

    def received(self, frame: Frame) -> None:
        match frame:
            case Knock() if self.address is None and not self.is_welcome:
                self.worker.introduce(self, frame)
            case Welcome() if not self.is_welcome:
                self.is_welcome = True
                self.worker.entered(self)
            case Refused(reason):
                self.why_refused = reason
            case AddRequest(request) if self.is_welcome:
                self.worker.take(self, request.request())
            case Abort(request_id) if self.is_welcome:
                self.worker.abort(self, request_id)
            case Control() if self.is_welcome:
                self.worker.ask(self, frame)
            case Stop() if self.is_welcome:
                self.worker.on_stop()
            case _:
                raise FrameError(f"a {type(frame).__name__} that no door sends now")

    def lost(self, reason: str) -> None:
        self.worker.left(self, reason)


class WorkerServer:
    """Lets doors use an engine. `start` once; then `listen` and `join`, in any number."""

    def __init__(
        self,
        facts: WorkerFacts,
        open_engine: EngineOpener,
        wire: Wire,
        *,
        vocab_size: int,
        prepare: Callable[[Request], Request] = lambda request: request,
        step_timeout_s: StepTimeout = "auto",
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`wire` is this worker's alone, and not started. `prepare` is asked for each request that
        has a grammar; it may take long, and raise InvalidRequest. `clock` must be the engine's."""
        self.facts = facts
        self._wire = wire
        self._clock = clock
        self._vocab_size = vocab_size
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="duetto-prepare")
        self._changed = Condition()  # guards the five fields below
        self._doors: set[_Door] = set()  # that are welcome
        self._owners: dict[str, _Door] = {}  # by request
        self._preparing: dict[str, bool] = {}  # requests; whether they were aborted meanwhile
        self._is_leaving = False
        self.num_joined = 0  # doors that were welcome, ever
        self._handle: EngineHandle = open_engine(self._deliver)
        self._watchdog = Watchdog(self._handle, self._fail, step_timeout_s=step_timeout_s)
        # Told on the watchdog's thread that the engine has ended or hangs, its requests having
        # ended; told that a door refuses this worker; and that one tells it to end.
        self.on_failure: Callable[[str], None] = lambda _reason: None
        self.on_refused: Callable[[str], None] = lambda _reason: None
        self.on_unanswered: Callable[[str], None] = lambda reason: logger.warning("%s", reason)
        self.on_stop: Callable[[], None] = lambda: None

    @property
    def num_live(self) -> int:
        """Requests of all doors."""
        return len(self._owners)

    @property
    def is_reachable(self) -> bool:
        """Whether its sockets' thread runs."""
        return self._wire.is_alive

    def start(self) -> None:
        self._handle.start()
        self._watchdog.start()
        self._wire.start()

    def listen(self, bound: BoundSocket) -> None:
        """Let doors come; `bound` is of `wire.bind`."""
        self._wire.listen(bound, lambda connection: _Door(self, connection))

    def join(self, address: WireAddress) -> None:
        """Serve the door that listens there, and again whenever it comes back."""
        self._join(address, FIRST_JOIN_S)

    def leave(self, timeout_s: float, is_hurried: Callable[[], bool] = lambda: False) -> bool:
        """Take no more requests, let live ones end for a while, abort the rest, end the engine;
        False if its last step has not ended. Blocks."""
        with self._changed:
            self._is_leaving = True
            for door in self._doors:
                door.connection.send(encoded(Leaving()))
            deadline = self._clock() + timeout_s
            while self._owners and self._handle.is_alive and not is_hurried():
                left_s = deadline - self._clock()
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, 0.1))
        has_ended = self._handle.stop(timeout_s)
        self._watchdog.stop()
        self.close("the worker has ended")
        return has_ended

    def close(self, reason: str) -> None:
        """Say goodbye to all doors, and end the sockets' thread."""
        with self._changed:
            doors = tuple(self._doors)
        for door in doors:
            door.connection.close(reason)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._wire.stop(FLUSH_S)

    # --- doors, on the wire's thread

    def introduce(self, door: _Door, knock: Knock) -> None:
        """Say who is here to a door that came."""
        why_not = why_not_versions(knock.protocol, knock.version, self.facts.version)
        if why_not is not None:
            logger.warning("%s is refused: %s", door.connection.peer, why_not)
            door.connection.send(encoded(Refused(why_not)))
            door.connection.close("refused")
        else:
            self._greet(door.connection)

    def _greet(self, connection: Connection) -> None:
        connection.send(encoded(hello(self.facts, boot_id(), self._clock())))

    def entered(self, door: _Door) -> None:
        logger.info("serves a door at %s", door.connection.peer)
        with self._changed:
            self._doors.add(door)
            self.num_joined += 1
            if self._is_leaving:
                door.connection.send(encoded(Leaving()))
            self._changed.notify_all()

    def left(self, door: _Door, reason: str) -> None:
        """A door is gone: nobody waits for its answers."""
        with self._changed:
            self._doors.discard(door)
            abandoned = sorted(door.live)
            door.live.clear()
            for request_id in abandoned:
                self._owners.pop(request_id, None)
            self._changed.notify_all()
        for request_id in abandoned:
            self._handle.abort(request_id)
        if door.is_welcome:
            level = logging.WARNING if abandoned else logging.INFO
            said = "the door at %s is gone (%s); %d requests of it are aborted"
            logger.log(level, said, door.connection.peer, reason, len(abandoned))
        if door.why_refused is not None:
            self.on_refused(f"{door.connection.peer} refuses this worker: {door.why_refused}")
        elif door.address is not None and not door.is_welcome:
            self.on_unanswered(f"{door.address} does not answer: {reason}")

    def _join(self, address: WireAddress, delay_s: float) -> None:
        def use(connection: Connection) -> ConnectionUser:
            door = _JoinedDoor(self, connection, address)
            door.delay_s = delay_s
            self._greet(connection)
            return door

        if not self._is_leaving:
            self._wire.connect(address, use)

    def join_again(self, door: "_JoinedDoor") -> None:
        """A door that was joined is lost."""
        if door.why_refused is None and door.address is not None:
            address = door.address
            next_s = FIRST_JOIN_S if door.is_welcome else min(2 * door.delay_s, LAST_JOIN_S)
            self._wire.call_later(door.delay_s, lambda: self._join(address, next_s))

    # --- requests, on the wire's thread

    def take(self, door: _Door, request: Request) -> None:
        """Raises FrameError for what no door of ours sends."""
        request_id = request.request_id
        if not 0 < len(request_id) <= MAX_ID:
            raise FrameError(f"a request id of {len(request_id)} characters; 1 to {MAX_ID} may be")
        if request_id in door.live:
            raise FrameError(f"request id {request_id} is in use")
        try:
            self._check(request)
        except InvalidRequest as error:
            self._tell_ended(door, request_id, str(error))
            return
        with self._changed:
            why_not = self._why_not_take(door, request_id)
            if why_not is None:
                self._owners[request_id] = door
                door.live.add(request_id)
                if request.grammar is None:
                    why_not = self._add(request)
                else:
                    self._preparing[request_id] = False
                    self._pool.submit(self._prepare_and_add, door, request)
        if why_not is not None:
            door.connection.send(encoded(NotTaken(request_id, why_not)))

    def _add(self, request: Request) -> str | None:
        """Give it to the engine; why not, if it cannot be."""
        try:
            self._handle.add(request)
        except ValueError as error:  # in use: of a door that was lost just now
            self._disown(request.request_id)
            return str(error)
        return None

    def _prepare_and_add(self, door: _Door, request: Request) -> None:
        """What may take long is on a thread of its own."""
        request_id, refusal = request.request_id, None
        try:
            request = self._prepare(request)
        except InvalidRequest as error:
            refusal = str(error)
        except Exception:
            logger.exception("request %s cannot be prepared", request_id)
            refusal = "the worker cannot prepare this request; its log says why"
        why_not = None
        with self._changed:
            is_aborted = self._preparing.pop(request_id)
            if self._owners.get(request_id) is not door:
                return  # its door is gone
            if is_aborted or refusal is not None:
                self._disown(request_id)
            else:
                why_not = self._add(request)
        if is_aborted:
            self._tell_ended(door, request_id, None)
        elif refusal is not None:
            self._tell_ended(door, request_id, refusal)
        elif why_not is not None:
            door.connection.send(encoded(NotTaken(request_id, why_not)))

    def _check(self, request: Request) -> None:
        """What intake checks at the door, and an executor takes for granted. Raises
        InvalidRequest."""
        size = self._vocab_size
        check_prompt(request.prompt_token_ids, size)
        request.sampling.check_vocabulary(size)
        named = [*request.stop_token_ids, *(i for word in request.bad_word_ids for i in word)]
        if named and not 0 <= min(named) <= max(named) < size:
            raise InvalidRequest("stop_token_ids", f"outside the vocabulary of {size}")
        if () in request.bad_word_ids:
            raise InvalidRequest("bad_words", "a word without tokens")
        if not 1 <= request.max_tokens <= 2**31:
            raise InvalidRequest("max_tokens", f"must be 1 or more, not {request.max_tokens}")
        self.facts.scheduler.check_priority(request.priority)
        for asked in (request.sampling.logprobs, request.sampling.prompt_logprobs):
            if asked is not None and not 0 <= asked <= size:
                raise InvalidRequest("logprobs", f"must be from 0 to {size}, not {asked}")

    def _why_not_take(self, door: _Door, request_id: str) -> str | None:
        if self._is_leaving:
            return "the worker is leaving"
        if request_id in self._owners or request_id in self._preparing:
            return f"request id {request_id} is in use at another door"
        if len(door.live) >= MAX_LIVE:
            return f"the worker has {MAX_LIVE} requests of this door"
        return None

    def abort(self, door: _Door, request_id: str) -> None:
        with self._changed:
            if request_id not in door.live:
                return
            if request_id in self._preparing:
                self._preparing[request_id] = True
                return
        self._handle.abort(request_id)

    def ask(self, door: _Door, frame: Control) -> None:
        """Raises FrameError for what is no question."""
        message = message_in(frame)
        if door.num_questions >= MAX_QUESTIONS_HERE:
            raise FrameError(f"{door.num_questions} questions that are not answered")
        door.num_questions += 1

        def answer(future: "Future[CacheReply]") -> None:
            error = future.exception()
            said = future.result() if error is None else error
            door.num_questions -= 1
            if not isinstance(said, BaseException) or isinstance(said, Exception):
                door.connection.send(reply_frame(frame.number, said))

        self._handle.control(message).add_done_callback(answer)

    # --- what comes of them, on the engine's thread, or a caller's

    def _deliver(self, report: StepReport) -> None:
        parts: defaultdict[_Door, list[RequestUpdate]] = defaultdict(list)
        with self._changed:
            for update in report.updates:
                door = self._owners.get(update.request_id)
                if door is None:
                    continue
                parts[door].append(update)
                if update.finish_reason is not None:
                    del self._owners[update.request_id]
                    door.live.discard(update.request_id)
            doors = set(parts) if report.record is None else self._doors | set(parts)
            if not self._owners:
                self._changed.notify_all()
        for door in doors:
            self._send(door, StepReport(tuple(parts.get(door, ())), report.record))

    def _send(self, door: _Door, report: StepReport) -> None:
        try:
            for data in report_frames(report):
                door.connection.send(data)
        except FrameError as error:
            logger.error("%s: %s", door.connection.peer, error)
            door.connection.close(str(error))
            self.left(door, str(error))

    def _tell_ended(self, door: _Door, request_id: str, error: str | None) -> None:
        reason = FinishReason.ABORT if error is None else FinishReason.ERROR
        update = RequestUpdate(request_id, finish_reason=reason, error=error)
        self._send(door, StepReport((update,)))

    def _disown(self, request_id: str) -> None:
        with self._changed:
            door = self._owners.pop(request_id, None)
            if door is not None:
                door.live.discard(request_id)

    def _fail(self, reason: str) -> None:
        """The engine has ended or hangs: end what doors wait for. On the watchdog's thread."""
        self._handle.give_up()
        self.close(f"the engine of the worker has failed: {reason}")
        self.on_failure(reason)


@dataclass(eq=False)
class _JoinedDoor(_Door):
    """A door that this worker has gone to."""

    delay_s: float = FIRST_JOIN_S

    def lost(self, reason: str) -> None:
        super().lost(reason)
        self.worker.join_again(self)
