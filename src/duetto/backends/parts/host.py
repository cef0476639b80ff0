"""The processes of a model's parts, as the engine's process sees them.

They are started together, do what they are ordered to, and end together: with this object, with
this process however it ends, or with the first of them that is lost. All orders go to parts in one
order, whichever thread they come from. Knows no arrays and no programs.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from subprocess import DEVNULL, Popen, TimeoutExpired
from threading import Event, Lock, Thread
from time import monotonic

from duetto.backends.parts.board import Board
from duetto.backends.parts.joined import JoinedParts
from duetto.backends.parts.messages import (
    Failure,
    FromPart,
    OrderDone,
    OrderFailed,
    PartChannel,
    PartLoading,
    PartOrder,
    PartReady,
    StartPart,
)
from duetto.backends.parts.part import PartPlace
from duetto.backends.parts.wiring import Wiring
from duetto.core.errors import ConfigError, EngineError, PartLost

HANG_S = 300.0  # without anything done by any part, while something is to be done
_LOOK_S = 1.0
_END_S = 5.0  # for a process to end by itself
_START = 0  # the order of being loaded

PartCommand = Callable[
    [int], Sequence[str]
]  # starts a part's process, with a descriptor of its own
PartSpec = Callable[[Wiring], bytes]  # what a part is to load, and how it is joined


@dataclass(slots=True)
class _Given:
    """An order whose answers are awaited."""

    awaits: set[int]  # parts
    answers: dict[int, OrderDone | PartReady] = field(default_factory=dict)
    error: Exception | None = None
    is_over: Event = field(default_factory=Event)


@dataclass(frozen=True, slots=True)
class _Process:
    place: PartPlace
    process: "Popen[bytes]"
    channel: "PartChannel[FromPart]"

    def how_it_ended(self) -> str:
        try:
            code = self.process.wait(_END_S)
        except TimeoutExpired:
            return "its process has closed its socket"
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was ended by {signal.Signals(-code).name}"

    def end(self) -> None:
        """At once, whatever it does."""
        self.process.kill()
        self.process.wait()

    def __str__(self) -> str:
        return f"{self.place} (process {self.process.pid})"


class PartHost:
    """Any thread may call any method."""

    def __init__(
        self,
        joined: JoinedParts,
        command: PartCommand,
        spec: PartSpec,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        hang_s: float = HANG_S,
    ) -> None:
        """Start and load all parts. Raises what loading raises: ConfigError, MemoryError or
        PartLost."""
        self.hang_s, self._on_progress = hang_s, on_progress
        self._sending, self._lock = Lock(), Lock()  # who holds the second never takes the first
        self._given: dict[int, _Given] = {}
        self._next = _START + 1
        self._lost: PartLost | None = None
        self._board, self.results = Board(joined.board), joined.results
        self._loading = {wiring.index: (0, 0) for wiring in joined.wirings}
        self._telling = Lock()
        self._processes: list[_Process] = []
        self.ready: tuple[PartReady, ...] = ()
        try:
            self._load(joined, command, spec)
        except BaseException:
            self.close()
            os.close(joined.results)
            raise
        finally:
            joined.let_go()

    def _load(self, joined: JoinedParts, command: PartCommand, spec: PartSpec) -> None:
        given = self._given[_START] = _Given({wiring.index for wiring in joined.wirings})
        for wiring in joined.wirings:
            self._processes.append(_start(wiring, command))
        for wiring, part in zip(joined.wirings, self._processes, strict=True):
            listener = Thread(target=self._listen, args=(wiring.index,), daemon=True)
            listener.start()
            part.channel.send(StartPart(spec(wiring)))
        answers = self._wait(_START, given)
        self.ready = tuple(
            answer for _, answer in sorted(answers.items()) if isinstance(answer, PartReady)
        )

    @property
    def num_parts(self) -> int:
        return len(self._processes)

    @property
    def process_ids(self) -> tuple[int, ...]:
        return tuple(part.process.pid for part in self._processes)

    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each part has computed steps."""
        return tuple(self._board.busy_s(part) for part in range(self.num_parts))

    def tell(self, make: Callable[[int], PartOrder]) -> None:
        """Give all parts an order that nobody answers."""
        self._give(make, range(self.num_parts), ())

    def ask(
        self,
        make: Callable[[int], PartOrder],
        to: Sequence[int] | None = None,
        answers_from: Sequence[int] | None = None,
    ) -> dict[int, OrderDone]:
        """Give an order, which `make` makes of its number, and wait for answers of some parts.

        Raises what the first part that failed raised (ValueError, MemoryError or EngineError); and
        PartLost if one is lost, or was.
        """
        to = range(self.num_parts) if to is None else to
        number, given = self._give(make, to, to if answers_from is None else answers_from)
        answers = self._wait(number, given)
        return {part: done for part, done in answers.items() if isinstance(done, OrderDone)}

    def _give(
        self, make: Callable[[int], PartOrder], to: Sequence[int], answers_from: Sequence[int]
    ) -> tuple[int, _Given]:
        given = _Given(set(answers_from))
        with self._sending:
            with self._lock:
                if self._lost is not None:
                    raise self._lost
                number, self._next = self._next, self._next + 1
                self._given[number] = given
            order = make(number)
            for part in to:
                try:
                    self._processes[part].channel.send(order)
                except OSError:
                    self._lose(part, self._processes[part].how_it_ended())
                    break
        return number, given

    def _wait(self, number: int, given: _Given) -> dict[int, OrderDone | PartReady]:
        seen, since = self._progress(), monotonic()
        while not given.is_over.wait(_LOOK_S):
            if (now := self._progress()) != seen:
                seen, since = now, monotonic()
            elif monotonic() - since > self.hang_s:
                late = [p for p in given.awaits if self._board.last_order(p) < number]
                first = min(late, key=self._board.last_order) if late else min(given.awaits)
                self._lose(first, f"it has done nothing for {self.hang_s:g} s, and hangs")
        with self._lock:
            self._given.pop(number, None)
        if given.error is not None:
            raise given.error
        return given.answers

    def _progress(self) -> tuple[object, ...]:
        return (
            *map(self._board.last_order, range(self.num_parts)),
            *self._loading.values(),
        )

    # --- on the listening threads ------------------------------------------------------------

    def _listen(self, index: int) -> None:
        part = self._processes[index]
        while True:
            try:
                message = part.channel.receive()
            except (EOFError, OSError):
                self._lose(index, part.how_it_ended())
                return
            except ValueError as error:
                self._lose(index, f"it says what cannot be understood: {error}")
                return
            match message:
                case PartLoading(done, total):
                    self._tell_progress(index, done, total)
                case PartReady():
                    self._answered(index, _START, message)
                case OrderDone():
                    self._answered(index, message.order, message)
                case OrderFailed(order, failure, text):
                    self._failed(index, order, failure, text)

    def _tell_progress(self, index: int, done: int, total: int) -> None:
        with self._telling:
            self._loading[index] = done, total
            parts = list(self._loading.values())
            if self._on_progress is not None and all(size for _, size in parts):
                self._on_progress(sum(d for d, _ in parts), sum(t for _, t in parts))

    def _answered(self, index: int, order: int, answer: OrderDone | PartReady) -> None:
        with self._lock:
            given = self._given.get(order)
            if given is None or index not in given.awaits:
                return
            given.answers[index] = answer
            if len(given.answers) == len(given.awaits):
                given.is_over.set()

    def _failed(self, index: int, order: int, failure: Failure, text: str) -> None:
        if failure == "skipped":  # whoever failed says more
            return
        if failure == "lost":  # who tells it may only have waited for another
            ended = [p for p, part in enumerate(self._processes) if part.process.poll() is not None]
            lost = ended[0] if ended else index
            self._lose(lost, self._processes[lost].how_it_ended() if ended else text)
            return
        error = _MAKES.get(failure, EngineError)(f"{self._processes[index].place}: {text}")
        with self._lock:
            given = self._given.get(order)
            if given is not None and not given.is_over.is_set():
                given.error = error
                given.is_over.set()

    # --- the end -----------------------------------------------------------------------------

    def _lose(self, index: int, cause: str) -> None:
        """The first part that is lost is the one that is named."""
        with self._lock:
            if self._lost is None:
                self._lost = PartLost(str(self._processes[index]), cause)
        for part in self._processes:
            part.end()
        with self._lock:
            for given in self._given.values():
                if not given.is_over.is_set():
                    given.error = self._lost
                    given.is_over.set()

    def close(self) -> None:
        """End all parts."""
        with self._lock:
            if self._lost is None:
                self._lost = PartLost("a part", "it was closed")
        for part in self._processes:
            part.channel.close()
        until = monotonic() + _END_S
        for part in self._processes:
            try:
                part.process.wait(max(0.0, until - monotonic()))
            except TimeoutExpired:
                part.end()


_MAKES: dict[Failure, Callable[[str], Exception]] = {
    "config": ConfigError,
    "memory": MemoryError,
    "value": ValueError,
}


def _start(wiring: Wiring, command: PartCommand) -> _Process:
    ours, theirs = socket.socketpair()
    try:
        process = Popen(
            command(theirs.fileno()),
            stdin=DEVNULL,
            stdout=DEVNULL,
            pass_fds=[theirs.fileno(), *wiring.descriptors],
            start_new_session=True,  # a key that interrupts the engine does not interrupt a step
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return _Process(wiring.place, process, PartChannel(ours, FromPart))
