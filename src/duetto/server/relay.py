"""The event loop's side of the engine: what is admitted goes in, updates come back to answers.

Knows the engine's handle and the metrics; knows no HTTP, no text and no scheduling.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from duetto.core.batch import StepRecord
from duetto.core.cache_control import CacheMessage, CacheReply
from duetto.core.config import SchedulerConfig
from duetto.core.errors import EngineError
from duetto.core.request import Request
from duetto.engine.engine import StepReport
from duetto.engine.handle import EngineHandle, EngineOpener
from duetto.engine.watchdog import Watchdog
from duetto.server.answer import MAX_STEPS, Answer
from duetto.server.http.errors import ApiError, stopping, unavailable
from duetto.server.http.places import Places
from duetto.server.observe.history import History
from duetto.server.observe.journal import Journal
from duetto.server.observe.metrics import Metrics
from duetto.server.settings import ServerSettings

logger = logging.getLogger(__name__)

NO_ENGINE = "no engine is there: it has stopped, or no worker has joined; try again later"
MAX_CHUNKS = 512  # of all streams that an event loop behind by many steps makes up for: 20 ms


@dataclass(slots=True)
class _Live:
    request: Request
    answer: Answer
    has_started: bool = False  # it was seen in a step


class Relay:
    """All methods run on the event loop that called `start`."""

    def __init__(
        self,
        open_engine: EngineOpener,
        config: SchedulerConfig,
        settings: ServerSettings,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`clock` must be the engine's own."""
        self._open_engine = open_engine
        self._settings = settings
        self._metrics = metrics
        self._places = Places(config.max_num_seqs, settings.max_num_queued_reqs, clock)
        self._live: dict[str, _Live] = {}
        self._handle: EngineHandle | None = None
        self._watchdog: Watchdog | None = None
        # Called on the watchdog's thread once the engine has failed and its requests have ended.
        self.on_failure: Callable[[str], None] = lambda _reason: None
        self.history = History()
        self.journal = Journal(settings)
        self.clock = clock
        self.is_stopping = False
        self.is_hurried = False  # whoever stops waits for nothing any more

    @property
    def num_live(self) -> int:
        """Engine requests that have had no final update."""
        return len(self._live)

    def started_ids(self) -> frozenset[str]:
        """Of the engine requests that are live and were seen in a step."""
        return frozenset([name for name, live in self._live.items() if live.has_started])

    def start(self) -> None:
        """Start the engine; its reports are handled on the running loop."""
        loop = asyncio.get_running_loop()

        def deliver(report: StepReport) -> None:
            loop.call_soon_threadsafe(self._receive, report)

        self._handle = self._open_engine(deliver)
        self._watchdog = Watchdog(
            self._handle,
            self._fail,
            step_timeout_s=self._settings.step_timeout_s,
            stall_timeout_s=self._settings.stall_timeout_s,
        )
        self._handle.start()
        self._watchdog.start()

    async def stop(self) -> None:
        """Refuse new requests, let live ones end for a while, abort the rest, end the thread."""
        self.is_stopping = True
        handle = self._running_handle()
        deadline = self._deadline()
        while self._live and handle.is_alive and self._may_wait(deadline):
            await asyncio.sleep(0.02)
        deadline = self._deadline()
        while not await asyncio.to_thread(handle.stop, 0.1):
            if not self._may_wait(deadline):
                logger.error("the engine's last step has not ended in time; it is left behind")
                break
        if self._watchdog is not None:
            self._watchdog.stop()
        await asyncio.sleep(0)  # let the last reports arrive
        self.journal.stop()

    @contextmanager
    def reserved(self, num_requests: int, client: bytes = b"") -> Iterator[None]:
        """Hold places in the queue while a prompt is tokenized.

        Raises ApiError 503 if it is full, and 429 if `client` holds its share (places.py).
        """
        if self.is_stopping:
            raise stopping()
        if not self._running_handle().is_alive:
            raise unavailable(NO_ENGINE, "engine_dead")
        self._places.ask(client, num_requests)
        self._places.take(client, num_requests)
        try:
            yield
        finally:
            self._places.give_back(client, num_requests)

    def submit(self, requests: tuple[Request, ...], name: str = "") -> Answer:
        """Hand requests to the engine. The answer must be given to `close`, whatever happens.

        `name` is what the client knows the reply by.
        """
        answer = Answer(requests, self._settings.max_pending_bytes)
        handle = self._running_handle()
        self.journal.record_arrival(requests, name)
        for request in requests:
            self._live[request.request_id] = _Live(request, answer)
            self._places.take(request.tenant, 1)
            self.history.record_arrival(request, name)
            handle.add(request)
        return answer

    async def control(self, message: CacheMessage) -> CacheReply:
        """What the engine's thread answers between two steps. Raises what it raises, an
        InvalidRequest; ApiError 503 if it has ended. Given up before its turn, it changes nothing.
        """
        try:
            return await asyncio.wrap_future(self._running_handle().control(message))
        except EngineError as error:
            raise unavailable(str(error), "engine_dead") from None

    def close(self, answer: Answer) -> None:
        """Abort what has not ended; nobody will read the answer any more."""
        answer.abandon()
        for request_id in sorted(answer.unfinished):
            self._running_handle().abort(request_id)

    def delivered(self, answer: Answer) -> None:
        """The client has taken the last of a stream."""
        for request in answer.requests:
            self.history.record_delivery(request.request_id, self.clock())

    @property
    def failure(self) -> str | None:
        """What is wrong with the engine, once it has ended or hangs."""
        return None if self._watchdog is None else self._watchdog.failure

    def check_health(self) -> None:
        """Raise ApiError 503 unless requests are accepted and those there are make progress."""
        if self.failure is not None:
            raise unavailable(self.failure, "engine_dead")
        if self.is_stopping:
            raise stopping()
        if self._handle is None or not self._handle.is_alive:
            raise unavailable(NO_ENGINE, "engine_dead")

    def _receive(self, report: StepReport) -> None:
        # With many streams each step is a chunk anyway, or the event loop must save work.
        max_steps = max(1, min(MAX_STEPS, MAX_CHUNKS // max(1, len(self._live))))
        for update in report.updates:
            if update.finish_reason is None:
                live = self._live[update.request_id]
            else:
                live = self._live.pop(update.request_id)
                has_started = live.has_started
                self._places.give_back(live.request.tenant, 1, has_started=has_started)
            self._metrics.record_update(live.request, update)
            ended = self.history.record_update(live.request, update)
            self.journal.record_update(live.request, update, ended)
            live.answer.put(update, max_steps)
            if live.answer.is_gone and live.answer.unfinished:
                self.close(live.answer)
        if report.record is not None:
            self._note_started(report.record)
            self._metrics.record_step(report.record)
            self.history.record_step(report.record)
            self.journal.record_step(report.record)
        if not self._live:  # what ended between steps has no step to be recorded in
            self._metrics.record_idle()
            self.journal.record_idle()

    def _note_started(self, record: StepRecord) -> None:
        for request_id in record.request_ids:
            live = self._live.get(request_id)
            if live is not None and not live.has_started:
                live.has_started = True
                self._places.start(live.request.tenant)

    def _fail(self, reason: str) -> None:
        """The engine has ended or hangs: tell everyone who waits. On the watchdog's thread."""
        self._running_handle().give_up()
        self.on_failure(reason)

    def _deadline(self) -> float:
        return self.clock() + self._settings.shutdown_timeout_s

    def _may_wait(self, deadline: float) -> bool:
        return self.clock() < deadline and not self.is_hurried

    def _running_handle(self) -> EngineHandle:
        if self._handle is None:
            raise ApiError(503, "the server is starting", kind="service_unavailable")
        return self._handle
