"""Several engines behind one handle: a door that holds it does not know how many there are.

Each request goes to one worker, by a policy; what comes back is passed on. If a worker is lost,
requests of which nothing was delivered are sent to another one, once; the others end with an error
that names it. Workers may join and leave at any time. Knows handles; no sockets.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from time import monotonic
from typing import Protocol

from duetto.cluster.routed_control import RoutedControl
from duetto.cluster.routed_worker import GaugeTotals, RoutedRequest, RoutedWorker, free_number
from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.cache_control import CacheCounts, CacheMessage, CacheReply
from duetto.core.request import FinishReason, Request
from duetto.engine.compute import Computing
from duetto.engine.engine import StepReport
from duetto.engine.handle import HUNG, STOPPED, Deliver, EngineHandle
from duetto.routing.policies import RoutingPolicy
from duetto.routing.prompt_blocks import prompt_hashes
from duetto.routing.sent_prefixes import SentPrefixes

logger = logging.getLogger(__name__)

NO_WORKER = "no worker is there to compute this request; try again later"
MAX_LOST = 2  # workers, after which a request is not sent to another one: it may be what ends them
RECENT_BLOCKS = 2048  # sent to a worker that tells its events, but may not have computed them yet
MAX_PREFILL_AT = 4  # workers that a request is told of


class CachedPrefixes(Protocol):
    """What workers that tell their KV events have cached (routing/prefix_index.py)."""

    def cached(self, hashes: Sequence[bytes], /) -> Mapping[str, int]:
        """How many of the first blocks each worker has."""
        ...


class RoutedEngine:
    """The handle of several engines. Every request added gets exactly one final update.

    Any thread may call any method. `deliver` is called on the threads of the workers' handles, and
    on a caller's; one call at a time.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        deliver: Deliver = lambda _report: None,
        clock: Callable[[], float] = monotonic,
        index: CachedPrefixes | None = None,
        observe: Callable[[StepRecord], None] = lambda _record: None,
    ) -> None:
        """`index` is of workers that tell events; of others, what they were sent is taken to be
        cached there, and of all what they were sent last. `observe` is told of each step of any
        worker, one at a time."""
        self._policy = policy
        self._hand_over = deliver
        self._clock = clock
        self._index = index
        self._observe = observe
        self._lock = Lock()  # guards all below, and the order of what is handed over
        self._workers: list[RoutedWorker] = []  # by number
        self._of_handle: dict[EngineHandle, RoutedWorker] = {}
        self._live: dict[str, RoutedRequest] = {}
        self._sent = SentPrefixes()
        self._totals = GaugeTotals()
        self._ending: str | None = None
        self._has_failed = False
        self._idle_since = clock()
        self._control = RoutedControl(self._counted)

    def opened(self, deliver: Deliver) -> EngineHandle:
        """This engine for a door, once (an EngineOpener)."""
        self._hand_over = deliver
        return self

    @property
    def workers(self) -> tuple[RoutedWorker, ...]:
        """Those that are here, in the order of their numbers."""
        return tuple(self._workers)

    # --- the handle --------------------------------------------------------------------------

    def start(self) -> None:
        """Workers are started by those who add them."""

    def add(self, request: Request) -> None:
        with self._lock:
            if request.request_id in self._live:
                raise ValueError(f"request id {request.request_id} is in use")
            if not self._live:
                self._idle_since = self._clock()
            routed = None if self._ending else self._place(request)
            if routed is None:
                self._tell_ended(request.request_id, FinishReason.ERROR, self._ending or NO_WORKER)
        if routed is not None:
            self._hand_on(routed)

    def abort(self, request_id: str) -> None:
        with self._lock:
            routed = self._live.get(request_id)
            if routed is None:
                return
            routed.is_aborted = True
            handle = routed.worker.handle
        handle.abort(request_id)

    def control(self, message: CacheMessage) -> "Future[CacheReply]":
        with self._lock:
            workers = tuple([w for w in self._workers if w.handle.is_alive])
        return self._control.ask(message, workers, self._ending or NO_WORKER)

    def stop(self, timeout: float) -> bool:
        with self._lock:
            self._ending = self._ending or STOPPED
            handles = [worker.handle for worker in self._workers]
        has_ended = True
        if handles:
            with ThreadPoolExecutor(min(len(handles), 32), "duetto-stop") as pool:
                has_ended = all(list(pool.map(lambda handle: handle.stop(timeout), handles)))
        self._end_live(FinishReason.ABORT, STOPPED)
        return has_ended

    def give_up(self) -> None:
        with self._lock:
            self._has_failed = True
            self._ending = self._ending or HUNG
            handles = [worker.handle for worker in self._workers]
        self._end_live(FinishReason.ERROR, HUNG)
        for handle in handles:
            handle.give_up()

    @property
    def computing(self) -> Computing | None:
        """Each worker watches its own steps."""
        return None

    @property
    def has_failed(self) -> bool:
        """Without workers it has not: others may join."""
        return self._has_failed

    @property
    def is_alive(self) -> bool:
        """Whether a request would be taken now."""
        return not self._has_failed and any(w.takes_requests for w in self.workers)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def last_progress_time(self) -> float:
        """Of the worker that was heard last: whether each computes is watched where it is."""
        return max(self._idle_since, *(w.handle.last_progress_time for w in self.workers), 0.0)

    # --- workers -----------------------------------------------------------------------------

    def join(self, make: Callable[[int], RoutedWorker]) -> RoutedWorker:
        """A worker takes requests from now on. `make` makes it, of a number."""
        with self._lock:
            worker = make(free_number(self._workers))
            self._workers.append(worker)
            self._workers.sort(key=lambda each: each.number)
            self._of_handle[worker.handle] = worker
            self._count(worker)
        return worker

    def leaving(self, handle: EngineHandle) -> None:
        """A worker takes no more requests; those that it has may end."""
        with self._lock:
            if (worker := self._of_handle.get(handle)) is not None:
                worker.is_leaving = True

    def leave(self, handle: EngineHandle) -> None:
        """A worker is gone: its handle has ended its requests, or does so now. Safe to call
        twice."""
        with self._lock:
            worker = self._of_handle.pop(handle, None)
            if worker is None:
                return
            self._workers.remove(worker)
            self._sent.left(worker.name)
            self._policy.left(worker.name)
            # What it has evicted stays counted, what it holds is gone.
            gone, gauges = worker.gauges, GaugeTotals(cache=worker.gauges.cache)
            kept = gauges._replace(cache=gauges.cache._replace(num_pinned_blocks=0))
            self._totals = self._totals.plus(gone, -1).plus(kept)
        self._control.left(worker)

    def take(self, handle: EngineHandle, report: StepReport) -> None:
        """What a worker's handle reports, or that of one that has left."""
        again: list[RoutedRequest] = []
        with self._lock:
            updates = []
            for update in report.updates:
                routed = self._live.get(update.request_id)
                if routed is None or routed.worker.handle is not handle:
                    continue
                elsewhere = self._rescued(routed, update)
                if elsewhere is not None:
                    again.append(elsewhere)
                    continue
                if update.tokens or update.finish_reason is None:
                    routed.told(len(update.tokens))
                if update.finish_reason is not None:
                    self._forget(routed)
                updates.append(update)
            record, worker = report.record, self._of_handle.get(handle)
            if record is not None:
                record = None if worker is None else self._with_totals(worker, record)
            if updates or record is not None:
                self._hand_over(StepReport(tuple(updates), record))
        for routed in again:
            self._hand_on(routed)

    def not_taken(self, handle: EngineHandle, request_id: str, reason: str) -> bool:
        """A worker has not begun a request; False if no other one takes it."""
        with self._lock:
            routed = self._live.get(request_id)
            if routed is None or routed.worker.handle is not handle:
                return True  # it has ended here, or is elsewhere already
            worker = routed.worker
            logger.info("%s did not take a request: %s", worker.name, reason)
            elsewhere = None
            if routed.may_be_elsewhere and not self._ending:
                refused_by = (*routed.refused_by, worker.name)
                elsewhere = self._place_again(routed, routed.num_lost, refused_by)
        if elsewhere is not None:
            self._hand_on(elsewhere)
        return elsewhere is not None

    # --- with the lock held ------------------------------------------------------------------

    def _place(self, request: Request, beside: tuple[str, ...] = ()) -> RoutedRequest | None:
        """Choose a worker for a request, which counts as sent there; None if there is none."""
        workers = [w for w in self._workers if w.takes_requests and w.name not in beside]
        if not workers:
            return None
        hashes, cached = self._cached(request)
        size = workers[0].config.block_size
        names = [worker.name for worker in workers]
        place = self._policy.choose(
            request, names, lambda: [w.view(cached.get(w.name, 0) * size) for w in workers]
        )
        worker = workers[place]
        uncached = max(1, request.num_prompt_tokens - cached.get(worker.name, 0) * size)
        routed = RoutedRequest(request, worker, uncached, refused_by=beside)
        self._ask_elsewhere(routed)
        routed.sent()
        if hashes:
            is_told = worker.tells_events and self._index is not None
            most = min(worker.config.num_blocks, RECENT_BLOCKS if is_told else sys.maxsize)
            self._sent.sent(worker.name, hashes, most)
        self._live[request.request_id] = routed
        return routed

    def _cached(self, request: Request) -> tuple[list[bytes], Mapping[str, int]]:
        """The prompt's blocks, and how many of them each worker has, as far as it is known."""
        if not self._policy.looks_at_prefix:
            return [], {}
        hashes = prompt_hashes(request, self._workers[0].config)
        cached = self._sent.cached(hashes)
        if self._index is not None:
            for name, count in self._index.cached(hashes).items():
                cached[name] = max(count, cached.get(name, 0))
        return hashes, cached

    def _ask_elsewhere(self, routed: RoutedRequest) -> None:
        """Tell a request of the workers that could compute its prompt, the first free one first.
        Whether that pays is the worker's to say that answers it."""
        asked = [worker for worker in self._workers if worker.takes_prompts]
        asked.sort(key=lambda worker: (worker.waiting_tokens, worker.prompt_tokens))
        routed.request.prefill_at = tuple([worker.link for worker in asked[:MAX_PREFILL_AT]])
        routed.asked = asked[0] if asked else None

    def _rescued(self, routed: RoutedRequest, update: RequestUpdate) -> RoutedRequest | None:
        """The request with another worker, if its own was lost before anything of it was
        delivered."""
        is_lost = update.finish_reason is FinishReason.ERROR and routed.worker.handle.has_failed
        if not is_lost or not routed.may_be_elsewhere or update.tokens or self._ending:
            return None
        if routed.num_lost + 1 >= MAX_LOST:
            return None
        return self._place_again(routed, routed.num_lost + 1, routed.refused_by)

    def _place_again(
        self, routed: RoutedRequest, num_lost: int, refused_by: tuple[str, ...]
    ) -> RoutedRequest | None:
        # A copy: an engine of this process writes to what it was given.
        again = self._place(replace(routed.request), refused_by)
        if again is not None:
            routed.gone()
            again.num_lost = num_lost
        return again

    def _forget(self, routed: RoutedRequest) -> None:
        del self._live[routed.request.request_id]
        routed.gone()
        self._count(routed.worker)

    def _with_totals(self, worker: RoutedWorker, record: StepRecord) -> StepRecord:
        """A step's record as of one engine: what runs, waits and is free is of all workers."""
        worker.last_record, worker.cache = record, record.cache
        self._count(worker)
        self._observe(record)
        return self._totals.on(record, worker.number)

    def _count(self, worker: RoutedWorker) -> None:
        if worker.handle in self._of_handle:
            gauges = worker.gauges_now()
            self._totals = self._totals.plus(worker.gauges, -1).plus(gauges)
            worker.gauges = gauges

    def _counted(self, worker: RoutedWorker, counts: CacheCounts) -> CacheCounts:
        """What all caches count, now that one was told. Takes the lock itself."""
        with self._lock:
            worker.cache = counts
            self._count(worker)
            return self._totals.cache

    def _tell_ended(self, request_id: str, reason: FinishReason, error: str) -> None:
        update = RequestUpdate(request_id, finish_reason=reason, error=error)
        self._hand_over(StepReport((update,)))

    # --- without it --------------------------------------------------------------------------

    def _hand_on(self, routed: RoutedRequest) -> None:
        handle, request_id = routed.worker.handle, routed.request.request_id
        handle.add(routed.request)
        if routed.is_aborted:  # meanwhile: the worker may not have known it
            handle.abort(request_id)

    def _end_live(self, reason: FinishReason, error: str) -> None:
        with self._lock:
            for request_id in sorted(self._live):
                self._forget(self._live[request_id])
                self._tell_ended(request_id, reason, error)
