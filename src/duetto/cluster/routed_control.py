"""What users ask of the KV cache, asked of all workers, and their replies as one.

A pin has a number here, and another one at each worker that keeps it: so workers are told of pins
by their texts. What was dropped or unpinned anywhere counts as done. A worker that joins later
knows no pin that was made before.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock

from duetto.cluster.routed_worker import RoutedWorker
from duetto.core.cache_control import (
    MAX_PAGE,
    CacheCounts,
    CachedText,
    CacheMessage,
    CacheReply,
    Drop,
    Dropped,
    Found,
    KeptBlocks,
    ListPins,
    LookUp,
    Pin,
    PinInfo,
    Pinned,
    PinNotFound,
    PinPage,
    Unpin,
)
from duetto.core.errors import EngineError

MAX_PINS = 100_000  # of all tenants that are known by number; the oldest are forgotten

Counted = Callable[[RoutedWorker, CacheCounts], CacheCounts]


@dataclass(eq=False)
class _RoutedPin:
    number: int
    tenant: bytes
    text: CachedText
    numbers: dict[str, int] = field(default_factory=dict)  # by the worker's name


Answers = list[tuple[RoutedWorker, CacheReply]]


class RoutedControl:
    """One router's. Any thread may call."""

    def __init__(self, counted: Counted) -> None:
        """`counted` is told what a worker's cache counts, and gives what all together do."""
        self._counted = counted
        self._lock = Lock()  # guards all below
        self._pins: OrderedDict[tuple[bytes, int], _RoutedPin] = OrderedDict()
        self._of_text: dict[tuple[bytes, CachedText], _RoutedPin] = {}
        self._num_made: Counter[bytes] = Counter()  # by tenant, which has numbers of its own

    def ask(
        self, message: CacheMessage, workers: Sequence[RoutedWorker], why_nobody: str
    ) -> "Future[CacheReply]":
        """`why_nobody` is the error where there are no workers."""
        future: Future[CacheReply] = Future()
        if not workers:
            future.set_exception(EngineError(why_nobody))
            return future
        try:
            asked = [(worker, self._for(worker, message)) for worker in workers]
        except PinNotFound as error:
            future.set_exception(error)
            return future
        _Round(future, asked, partial(self._merged, message)).begin()
        return future

    def left(self, worker: RoutedWorker) -> None:
        """It keeps no pin any more; what nobody keeps is gone."""
        with self._lock:
            for pin in [*self._pins.values()]:
                if pin.numbers.pop(worker.name, None) is not None and not pin.numbers:
                    self._forget(pin)

    def _for(self, worker: RoutedWorker, message: CacheMessage) -> CacheMessage:
        """The message as a worker understands it. Raises PinNotFound."""
        with self._lock:
            if isinstance(message, Unpin | Drop) and isinstance(message.pin, int):
                return replace(message, pin=self._known(message.tenant, message.pin).text)
            if isinstance(message, ListPins):
                own = [p.numbers.get(worker.name, 0) for p in self._page(message)[0]]
                first = min([number for number in own if number], default=1)
                return replace(message, after=first - 1, limit=MAX_PAGE)
        return message

    def _known(self, tenant: bytes, number: int) -> _RoutedPin:
        pin = self._pins.get((tenant, number))
        if pin is None:
            raise PinNotFound
        return pin

    def _page(self, message: ListPins) -> tuple[list[_RoutedPin], bool]:
        mine = [p for p in self._pins.values() if p.tenant == message.tenant]
        later = [pin for pin in mine if pin.number > message.after]
        return later[: message.limit], len(later) > message.limit

    def _merged(self, message: CacheMessage, answers: Answers) -> CacheReply:
        with self._lock:
            match message:
                case LookUp():
                    return _found([reply for _, reply in answers if isinstance(reply, Found)])
                case Pin(tenant, text):
                    return self._pinned(self._begun(tenant, text, answers), answers)
                case Unpin(tenant, asked):
                    pin = self._of(tenant, asked)
                    told = self._pinned(pin, answers)
                    self._forget(pin)
                    return told
                case Drop(tenant, asked):
                    self._forget(self._of(tenant, asked))
                    return self._dropped(answers)
                case ListPins():
                    return self._listed(message, answers)

    def _begun(self, tenant: bytes, text: CachedText, answers: Answers) -> _RoutedPin:
        pin = self._of_text.get((tenant, text))
        if pin is None:
            self._num_made[tenant] += 1
            pin = _RoutedPin(self._num_made[tenant], tenant, text)
            self._pins[tenant, pin.number] = self._of_text[tenant, text] = pin
            if len(self._pins) > MAX_PINS:
                self._forget(next(iter(self._pins.values())))
        for worker, reply in answers:
            if isinstance(reply, Pinned):
                pin.numbers[worker.name] = reply.pin.number
        return pin

    def _of(self, tenant: bytes, asked: "int | CachedText") -> _RoutedPin | None:
        if isinstance(asked, CachedText):
            return self._of_text.get((tenant, asked))
        return self._pins.get((tenant, asked))

    def _forget(self, pin: _RoutedPin | None) -> None:
        if pin is not None and self._pins.pop((pin.tenant, pin.number), None) is not None:
            del self._of_text[pin.tenant, pin.text]

    def _counts(self, answers: Answers) -> CacheCounts:
        counts = CacheCounts()
        for worker, reply in answers:
            if isinstance(reply, Pinned | Dropped):
                counts = self._counted(worker, reply.counts)
        return counts

    def _pinned(self, pin: _RoutedPin | None, answers: Answers) -> Pinned:
        told = [reply for _, reply in answers if isinstance(reply, Pinned)]
        number = told[0].pin.number if pin is None else pin.number
        info = _as_one([reply.pin for reply in told], number)
        return Pinned(info, _usage([reply.usage for reply in told]), self._counts(answers))

    def _dropped(self, answers: Answers) -> Dropped:
        told = [reply for _, reply in answers if isinstance(reply, Dropped)]
        return Dropped(
            num_dropped=sum([reply.num_dropped for reply in told]),
            num_in_use=sum([reply.num_in_use for reply in told]),
            num_in_tiers=sum([reply.num_in_tiers for reply in told]),
            num_kept=sum([reply.num_kept for reply in told]),
            has_ended_pin=any(reply.has_ended_pin for reply in told),
            counts=self._counts(answers),
        )

    def _listed(self, message: ListPins, answers: Answers) -> PinPage:
        pages = {w.name: reply for w, reply in answers if isinstance(reply, PinPage)}
        shown, (page, has_more) = [], self._page(message)
        for pin in page:
            infos = []
            for name, own in [*pin.numbers.items()]:
                if (told := pages.get(name)) is None:
                    continue
                here = [info for info in told.pins if info.number == own]
                infos += here
                last = max([info.number for info in told.pins], default=0)
                if not here and (not told.has_more or last > own):
                    del pin.numbers[name]  # its time is over there
            if infos:
                shown.append(_as_one(infos, pin.number))
            elif not pin.numbers:
                self._forget(pin)
        return PinPage(shown, has_more, _usage([told.usage for told in pages.values()]))


class _Round:
    """One question to several workers; the last answer makes the reply."""

    def __init__(
        self,
        future: "Future[CacheReply]",
        asked: Sequence[tuple[RoutedWorker, CacheMessage]],
        merged: Callable[[Answers], CacheReply],
    ) -> None:
        self._future = future
        self._asked = asked
        self._merged = merged
        self._lock = Lock()  # guards the two below
        self._answers: dict[int, CacheReply | BaseException] = {}
        self._futures: list[Future[CacheReply]] = []

    def begin(self) -> None:
        for place, (worker, message) in enumerate(self._asked):
            answer = worker.handle.control(message)
            self._futures.append(answer)
            answer.add_done_callback(partial(self._told, place))
        self._future.add_done_callback(self._given_up)

    def _given_up(self, future: "Future[CacheReply]") -> None:
        if future.cancelled():
            for answer in self._futures:
                answer.cancel()

    def _told(self, place: int, answer: "Future[CacheReply]") -> None:
        if answer.cancelled():
            said: CacheReply | BaseException = EngineError("the question was given up")
        else:
            said = answer.exception() or answer.result()
        with self._lock:
            self._answers[place] = said
            is_last = len(self._answers) == len(self._asked)
        if is_last and self._future.set_running_or_notify_cancel():
            self._end()

    def _end(self) -> None:
        answers: Answers = []
        errors: list[BaseException] = []
        for place, (worker, _) in enumerate(self._asked):
            said = self._answers[place]
            if isinstance(said, BaseException):
                errors.append(said)
            else:
                answers.append((worker, said))
        if not answers:  # what is wrong with the question says more than that nobody knows the pin
            errors.sort(key=lambda error: isinstance(error, PinNotFound | EngineError))
            self._future.set_exception(errors[0])
            return
        try:
            self._future.set_result(self._merged(answers))
        except Exception as error:  # it belongs to the caller
            self._future.set_exception(error)


def _found(replies: Sequence[Found]) -> Found:
    """Of each text, what the worker has that has most of it: requests are sent there."""
    best = max(replies, key=lambda found: (found.num_cached + found.num_loadable, found.num_cached))
    segments = [_found(same) for same in zip(*(r.segments for r in replies), strict=True)]
    return replace(best, segments=tuple(segments))


def _as_one(infos: Sequence[PinInfo], number: int) -> PinInfo:
    """A pin at several workers: how much of it is there is that of who has most."""
    best = max(infos, key=lambda info: info.num_cached)
    return replace(best, number=number, age_s=max([info.age_s for info in infos]))


def _usage(replies: Sequence[KeptBlocks]) -> KeptBlocks:
    return KeptBlocks(sum([u.num_kept for u in replies]), sum([u.quota for u in replies]))
