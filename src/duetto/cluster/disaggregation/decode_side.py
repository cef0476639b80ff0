"""An engine whose prompts may be computed on another one: its requests wait here while the KV of
their prompts is on its way, and are added once it is there, or once it is certain not to come.

Belongs to the engine's thread, as the engine does. Other threads only leave what has happened, and
wake it. Knows no bytes; the protocol is protocol.py's, a link's end peer.py's.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event
from time import monotonic

from duetto.cluster.disaggregation.counts import MovementAlarm, TransferCounts
from duetto.cluster.disaggregation.kv_frames import KVHello
from duetto.cluster.disaggregation.peer import Incoming, LayerRows, OpenLink, PrefillPeer
from duetto.cluster.disaggregation.prefill_choice import HereNow, PrefillChoice
from duetto.cluster.disaggregation.protocol import (
    GiveUp,
    PublishBlocks,
    ReturnBlocks,
    TransferAction,
)
from duetto.cluster.disaggregation.timer import WakeTimer
from duetto.core.batch import RequestUpdate
from duetto.core.cache_control import CacheMessage, CacheReply
from duetto.core.errors import InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.core.timings import Part
from duetto.engine.compute import Computing
from duetto.engine.engine import Engine, StepReport
from duetto.scheduler.block_pool import BlockHash
from duetto.scheduler.imports import TakenBlocks
from duetto.scheduler.prefix import reusable_hashes

logger = logging.getLogger(__name__)

MAX_TRIES = 2  # engines that are asked for one prompt
NAP_S = 0.002  # where all that could run waits for blocks of a transfer


@dataclass(slots=True, eq=False)
class _OnItsWay:
    """A prompt that is computed elsewhere, until its request goes on and its blocks are free."""

    request: Request
    taken: TakenBlocks
    peer: PrefillPeer
    incoming: Incoming
    deadline: float
    tried: list[str]  # addresses
    followers: list[Request] = field(default_factory=list)  # their prompts begin alike
    is_waiting: bool = True  # the request, for its prompt
    is_aborted: bool = False
    has_blocks: bool = True


class DecodeSide:
    """What the engine's thread steps in place of the engine."""

    def __init__(
        self,
        engine: Engine,
        rows: LayerRows,
        hello: KVHello,
        open_link: OpenLink,
        choice: PrefillChoice,
        counts: TransferCounts | None = None,
    ) -> None:
        self.engine = engine
        self.counts = counts or TransferCounts()
        self.wake: Callable[[], None] = _nobody  # lets the engine's thread step, from any thread
        self._rows = rows
        self._hello = hello
        self._open_link = open_link
        self._choice = choice
        self._alarm = MovementAlarm(self.counts)
        self._peers: dict[str, PrefillPeer] = {}
        self._transfers: dict[Incoming, _OnItsWay] = {}
        self._waiting: dict[str, _OnItsWay] = {}  # by request
        self._coming: dict[BlockHash, _OnItsWay] = {}
        self._happened: deque[tuple[Incoming, TransferAction]] = deque()
        self._has_happened = Event()
        self._updates: list[RequestUpdate] = []  # to be told with the next step
        self._timer = WakeTimer(self._tell_time, "duetto-kv-timer")
        self._is_late = False

    # --- what the engine's thread uses -------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._happened or self._is_late or self._updates or self.engine.has_work)

    @property
    def computing(self) -> Computing | None:
        return self.engine.computing

    @property
    def num_on_their_way(self) -> int:
        """Requests that wait for KV of another engine."""
        return sum([1 + len(one.followers) for one in self._waiting.values()])

    def add(self, request: Request) -> None:
        """Raises InvalidRequest, and changes nothing, if it can never fit."""
        self.engine.scheduler.config.check_fits(request)
        why_here = self._begin(request, [])
        if why_here is not None:
            self.engine.add(request)
            self.counts.note_local(why_here)

    def abort(self, request_id: str) -> RequestUpdate | None:
        self._settle()
        one = self._waiting.get(request_id)
        if one is not None:
            one.is_aborted = True
            one.peer.cancel(one.incoming, "aborted")
            self._settle()
            return self._aborted(one.request)
        for leader in self._waiting.values():
            for request in leader.followers:
                if request.request_id == request_id:
                    leader.followers.remove(request)
                    return self._aborted(request)
        return self.engine.abort(request_id)

    def step(self) -> StepReport:
        self._settle()
        updates, self._updates = tuple(self._updates), []
        if not self.engine.has_work:
            return StepReport(updates)
        report = self.engine.step()
        if self._transfers and report.record is None and not self.engine.scheduler.running:
            self._has_happened.wait(NAP_S)
        return StepReport((*updates, *report.updates), self.counts.told_by(report.record))

    def control(self, message: CacheMessage) -> CacheReply:
        return self.engine.control(message)

    def close(self) -> None:
        """End all links, and the threads of this. Who waits is computed by the engine."""
        for peer in self._peers.values():
            peer.close()
        self._timer.stop()
        self._settle()

    # --- where a prompt is computed ----------------------------------------------------------

    def _begin(self, request: Request, tried: list[str]) -> str | None:
        """Ask for its prompt elsewhere; or why it is to be computed here."""
        if not request.prefill_at:
            return "nobody"
        if request.reuse is not None or request.pooling is not None:
            return "kind"
        scheduler, size = self.engine.scheduler, self._hello.block_size
        hashes = reusable_hashes(request, scheduler.config)
        num_here = len(scheduler.pool.find(hashes))
        if num_here == len(hashes):  # also of one whose prompt is scored
            return "cached"
        leader = self._coming.get(hashes[num_here])
        if leader is not None:
            leader.followers.append(request)
            return None
        num_past = size * (num_here + scheduler.tiers.num_reachable(hashes[num_here:]))
        num_new = request.num_tokens - num_past
        if not self._choice.is_remote(num_new, num_past, self._here_now()):
            return "price"
        self._alarm.asked(monotonic())
        return self._ask(request, tried, self._choice.timeout_s(num_new, num_past))

    def _here_now(self) -> HereNow:
        scheduler = self.engine.scheduler
        counts = [r.num_uncomputed_tokens for r in scheduler.running.values()]
        waiting = sum([r.num_uncomputed_tokens for r in scheduler.waiting])
        return HereNow(len(counts), waiting + sum([count for count in counts if count > 1]))

    def _ask(self, request: Request, tried: list[str], timeout_s: float) -> str | None:
        peer = self._peer_of(request, tried)
        if peer is None:
            return "no link"
        taken = self.engine.scheduler.imports.take(request)
        if taken is None:
            return "no room"
        num_tokens = len(taken.blocks) * self._hello.block_size
        incoming = peer.ask(
            taken.missing,
            taken.num_here,
            request.prompt_token_ids[:num_tokens],
            salt=request.cache_salt,
            tenant=request.tenant,
            priority=request.priority,
            deadline_s=timeout_s,
        )
        deadline = monotonic() + timeout_s
        one = _OnItsWay(request, taken, peer, incoming, deadline, [*tried, peer.address])
        self._transfers[incoming] = self._waiting[request.request_id] = one
        self._coming.update(dict.fromkeys(taken.hashes[taken.num_here :], one))
        self._timer.at(deadline)
        return None

    def _peer_of(self, request: Request, tried: Sequence[str]) -> PrefillPeer | None:
        """The link to the first of its engines that was not tried, and is there."""
        for address in request.prefill_at if len(tried) < MAX_TRIES else ():
            peer = self._peers.get(address)
            closed_until = None if peer is None else peer.closed_until
            if address in tried or (closed_until or 0.0) > monotonic():
                continue
            if peer is None or closed_until is not None:
                parts = self._hello, self._rows, self._open_link, self._tell, self.counts
                peer = self._peers[address] = PrefillPeer(address, *parts)
            return peer
        return None

    # --- what has happened -------------------------------------------------------------------

    def _tell(self, incoming: Incoming, actions: tuple[TransferAction, ...]) -> None:
        """On any thread."""
        self._happened.extend((incoming, action) for action in actions)
        self._has_happened.set()
        self.wake()

    def _tell_time(self) -> None:
        """On the timer's thread."""
        self._is_late = True
        self.wake()

    def _settle(self) -> None:
        self._has_happened.clear()
        if self._is_late:
            self._is_late = False
            now = monotonic()
            for one in [one for one in self._waiting.values() if one.deadline <= now]:
                one.peer.cancel(one.incoming, "slow")
        while self._happened:
            incoming, action = self._happened.popleft()
            one = self._transfers[incoming]
            match action:
                case PublishBlocks():
                    self._arrived(one)
                case GiveUp():
                    self._given_up(one, action)
                case ReturnBlocks():
                    self.engine.scheduler.imports.drop(one.taken)
                    one.has_blocks = False
            if not (one.is_waiting or one.has_blocks):
                del self._transfers[incoming]

    def _arrived(self, one: _OnItsWay) -> None:
        self._stop_waiting(one)
        one.has_blocks = False
        imports = self.engine.scheduler.imports
        imports.publish(one.taken)
        came = one.incoming
        if came.first_time is not None:
            num_bytes = len(one.taken.missing) * self._hello.block_bytes
            self._choice.observe(num_bytes, came.last_time - came.first_time)
        self.counts.num_imported += 1
        if one.is_aborted:
            imports.forget(one.request.request_id)
        else:
            self._add_here(one.request)
        for follower in one.followers:
            self._add_again(follower, [])

    def _given_up(self, one: _OnItsWay, action: GiveUp) -> None:
        self._stop_waiting(one)
        request, cause = one.request, action.cause
        tried = one.tried
        if one.is_aborted:
            tried = []  # the others have done nothing yet
        elif cause == "slow":  # it does not wait again
            self.counts.note_local(cause)
            self._add_here(request)
        else:
            logger.info(
                "no KV of %s from %s: %s", request.request_id, one.peer.address, action.reason
            )
            self._add_again(request, tried, cause)
        for follower in one.followers:
            self._add_again(follower, tried, cause)

    def _stop_waiting(self, one: _OnItsWay) -> None:
        one.is_waiting = False
        del self._waiting[one.request.request_id]
        for block_hash in one.taken.hashes[one.taken.num_here :]:
            if self._coming.get(block_hash) is one:
                del self._coming[block_hash]

    def _add_again(self, request: Request, tried: list[str], cause: str | None = None) -> None:
        """Another engine is asked, or it is computed here."""
        why_here = self._begin(request, tried)
        if why_here is not None:
            self.counts.note_local(cause or why_here)
            self._add_here(request)

    def _add_here(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except InvalidRequest as error:
            self.engine.scheduler.imports.forget(request.request_id)
            self._updates.append(_ended(request, FinishReason.ERROR, str(error)))

    def _aborted(self, request: Request) -> RequestUpdate:
        return _ended(request, FinishReason.ABORT)


def _ended(request: Request, reason: FinishReason, error: str | None = None) -> RequestUpdate:
    """Of a request that the scheduler has never seen."""
    now = monotonic()
    request.finish_reason = reason
    request.timings.account(Part.WAITING, now)
    request.timings.finish_time = now
    return RequestUpdate(
        request.request_id, finish_reason=reason, error=error, timings=request.timings
    )


def _nobody() -> None:
    """Nobody sleeps."""
