"""Several engines that share the stages of one model: one batch is then in each stage.

Each has a scheduler, requests and blocks of its own, and steps on a thread of its own; a request
stays with the engine that had the fewest when it came. Offers what an Engine does, to one thread.
The twin in virtual time is simulation/virtual_engines.py. Standard library only.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from duetto.core.batch import RequestUpdate
from duetto.core.cache_control import CacheMessage, CacheReply, Found, LookUp
from duetto.core.errors import InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.engine.compute import Computing
from duetto.engine.engine import Engine, StepReport

_NO_CONTROL = (
    "with --pp: each of the batches under way has a cache of its own, and nothing is kept in it "
    "on purpose"
)


class _Stepped(NamedTuple):
    """A step that has ended."""

    engine: int
    report: StepReport
    error: BaseException | None = None


_Steps = SimpleQueue[Callable[[], _Stepped] | None]


class VirtualEngines:
    """Belongs to one thread, as an Engine does."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._stepping: dict[int, None] = {}  # engines whose step is under way, oldest first
        self._ended: SimpleQueue[_Stepped] = SimpleQueue()
        self._kept: deque[StepReport] = deque()  # to be told next
        self._waiting: list[list[Request]] = [[] for _ in engines]  # for a step to end
        self._engine_of: dict[str, int] = {}  # of each live request
        self._turn = 0
        self._steps: list[_Steps] = [SimpleQueue() for _ in engines]
        for number, steps in enumerate(self._steps):
            name = f"duetto-engine-{number}"
            Thread(target=_run, args=(steps, self._ended), name=name, daemon=True).start()
        weakref.finalize(self, _end_threads, self._steps)

    @property
    def num_engines(self) -> int:
        return len(self._engines)

    @property
    def has_work(self) -> bool:
        return bool(
            self._stepping
            or self._kept
            or any(self._waiting)
            or any(engine.has_work for engine in self._engines)
        )

    @property
    def computing(self) -> Computing | None:
        """What has been computed for longest. Any thread may ask."""
        for number in list(self._stepping):
            return self._engines[number].computing
        return None

    def add(self, request: Request) -> None:
        """Accept a request. Raises InvalidRequest, and changes nothing, if it can never fit; while
        its engine computes, that is told by its final update."""
        number = self._least_loaded()
        if number in self._stepping:
            self._waiting[number].append(request)
        else:
            self._engines[number].add(request)
        self._engine_of[request.request_id] = number
        self._turn = (number + 1) % len(self._engines)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now, in any state; None if it is unknown or has ended."""
        number = self._engine_of.get(request_id)
        if number is None:
            return None
        for request in self._waiting[number]:
            if request.request_id == request_id:
                self._waiting[number].remove(request)
                del self._engine_of[request_id]
                return RequestUpdate(request_id, finish_reason=FinishReason.ABORT)
        self._settle(number)
        update = self._engines[number].abort(request_id)
        if update is not None:  # what its last step brought is no more of interest
            del self._engine_of[request_id]
            self._kept = deque(_without(report, request_id) for report in self._kept)
        return update

    def control(self, message: CacheMessage) -> CacheReply:
        """How much of a text some engine has; the rest is refused."""
        if not isinstance(message, LookUp):
            raise InvalidRequest("cache", _NO_CONTROL)
        found: list[Found] = []
        for number, engine in enumerate(self._engines):
            self._settle(number)
            reply = engine.control(message)
            assert isinstance(reply, Found)
            found.append(reply)
        return max(found, key=lambda each: each.num_cached)

    def forget_cached(self) -> None:
        """Forget every reusable prefix."""
        for number, engine in enumerate(self._engines):
            self._settle(number)
            engine.forget_cached()

    def step(self) -> StepReport:
        """Let every engine with work compute a step, and wait for the first that ends.

        Raises what ends an engine for good (DeviceLost).
        """
        if not self._kept:
            self._start()
        if not self._kept and self._stepping:
            self._take()
        return self._kept.popleft() if self._kept else StepReport(())

    def _start(self) -> None:
        for number, engine in enumerate(self._engines):
            if number in self._stepping:
                continue
            self._let_in(number)
            if engine.has_work:
                self._stepping[number] = None
                self._steps[number].put(_step_of(number, engine))

    def _let_in(self, number: int) -> None:
        """Those who came while the engine computed."""
        waiting, self._waiting[number] = self._waiting[number], []
        for request in waiting:
            try:
                self._engines[number].add(request)
            except InvalidRequest as error:
                refused = RequestUpdate(
                    request.request_id, finish_reason=FinishReason.ERROR, error=str(error)
                )
                self._keep(StepReport((refused,)))

    def _settle(self, number: int) -> None:
        """Wait until an engine may be touched."""
        while number in self._stepping:
            self._take()

    def _take(self) -> None:
        stepped = self._ended.get()
        del self._stepping[stepped.engine]
        if stepped.error is not None:
            raise stepped.error
        self._keep(stepped.report)

    def _keep(self, report: StepReport) -> None:
        for update in report.updates:
            if update.finish_reason is not None:
                self._engine_of.pop(update.request_id, None)
        self._kept.append(report)

    def _least_loaded(self) -> int:
        """The engine with the fewest requests; ties go in turn."""
        count = len(self._engines)
        live = [0] * count
        for number in self._engine_of.values():
            live[number] += 1
        return min(range(count), key=lambda i: (live[i], (i - self._turn) % count))


def _step_of(number: int, engine: Engine) -> Callable[[], _Stepped]:
    def step() -> _Stepped:
        try:
            return _Stepped(number, engine.step())
        except BaseException as error:  # it concerns who takes the report
            return _Stepped(number, StepReport(()), error)

    return step


def _run(steps: _Steps, ended: "SimpleQueue[_Stepped]") -> None:
    """A thread, which holds an engine only while it steps: who drops the engines ends it."""
    while True:
        step = steps.get()
        if step is None:
            return
        ended.put(step())
        del step


def _end_threads(steps: Sequence[_Steps]) -> None:
    for each in steps:
        each.put(None)


def _without(report: StepReport, request_id: str) -> StepReport:
    updates = tuple(u for u in report.updates if u.request_id != request_id)
    return report._replace(updates=updates)
