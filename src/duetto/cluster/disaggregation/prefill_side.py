"""An engine that computes prompts for others beside its own requests, and sends their KV while it
computes: an ask becomes an ordinary request of one token, and what a step completes of it is sent.

Belongs to the engine's thread, as the engine does. Other threads only leave what has happened, and
wake it. The protocol is protocol.py's, a link's end prefill_session.py's.
"""

import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Literal, NamedTuple

import numpy as np

from duetto.cluster.disaggregation.counts import TransferCounts
from duetto.cluster.disaggregation.kv_frames import KVHello
from duetto.cluster.disaggregation.peer import LayerRows
from duetto.cluster.disaggregation.prefill_choice import PrefillChoice
from duetto.cluster.disaggregation.prefill_session import (
    Outgoing,
    PrefillSession,
    SentPiece,
    SessionUser,
)
from duetto.cluster.disaggregation.sending import LayersOf, SentStep
from duetto.cluster.disaggregation.timer import WakeTimer
from duetto.core.batch import RequestUpdate, ScheduledBatch, ScheduledRequest, StepOutput
from duetto.core.cache_control import CacheMessage, CacheReply
from duetto.core.errors import InvalidRequest
from duetto.core.executor import Executor, Pending
from duetto.core.request import FinishReason, Request
from duetto.core.sampling_params import SamplingParams
from duetto.engine.compute import Computing
from duetto.engine.engine import Engine, StepReport

logger = logging.getLogger(__name__)

MAX_ASKS = 128  # prompts for others at a time
SENT_SHARE = 2  # one part in so many of the pool may be held for transfers
LOOK_EVERY_S = 5.0  # at links on which nobody acknowledges
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


class _Happened(NamedTuple):
    kind: Literal["ask", "abort", "release"]
    outgoing: Outgoing


class PrefillSide:
    """What the engine's thread steps in place of the engine."""

    def __init__(
        self,
        engine: Engine,
        rows: LayerRows,
        layers_done: LayersOf,
        hello: KVHello,
        vocab_size: int,
        choice: PrefillChoice,
        counts: TransferCounts | None = None,
    ) -> None:
        self.engine = engine
        self.counts = counts or TransferCounts()
        self.wake: Callable[[], None] = _nobody  # lets the engine's thread step, from any thread
        self._rows = rows
        self._layers_done = layers_done
        self._hello = hello
        self._vocab_size = vocab_size
        self._choice = choice
        self._happened: deque[_Happened] = deque()
        self._open: dict[str, Outgoing] = {}  # by request: its blocks may be held
        self._computing: set[str] = set()  # requests of the engine that are for others
        self._sessions: list[PrefillSession] = []
        self._num_sessions = 0
        self._timer = WakeTimer(self._look, "duetto-kv-timer")
        engine.wrap_executor(lambda executor: _Watched(executor, self))

    def session(self) -> PrefillSession:
        """For a link that somebody opens to this engine. On any thread."""
        self._num_sessions += 1
        user = SessionUser(
            ask=lambda outgoing: self._tell("ask", outgoing),
            abort=lambda outgoing: self._tell("abort", outgoing),
            release=lambda outgoing: self._tell("release", outgoing),
            over=self._sessions.remove,
        )
        session = PrefillSession(self._num_sessions, self._hello, self._rows, user, self.counts)
        self._sessions.append(session)
        self._timer.at(monotonic() + LOOK_EVERY_S)
        return session

    # --- what the engine's thread uses -------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._happened or self.engine.has_work)

    @property
    def computing(self) -> Computing | None:
        return self.engine.computing

    @property
    def num_open(self) -> int:
        """Prompts for others that are computed, sent or not acknowledged."""
        return len(self._open)

    def add(self, request: Request) -> None:
        self.engine.add(request)

    def abort(self, request_id: str) -> RequestUpdate | None:
        return self.engine.abort(request_id)

    def control(self, message: CacheMessage) -> CacheReply:
        return self.engine.control(message)

    def step(self) -> StepReport:
        self._settle()
        if not self.engine.has_work:
            return StepReport(())
        report = self.engine.step()
        record = self.counts.told_by(report.record)
        if not self._computing:
            return StepReport(report.updates, record)
        own = tuple([u for u in report.updates if u.request_id not in self._computing])
        for update in report.updates:
            if update.finish_reason is not None and update.request_id in self._computing:
                self._ended(update)
        return StepReport(own, record)

    def close(self) -> None:
        """End all links, and the threads of this."""
        for session in [*self._sessions]:
            session.close()
        self._timer.stop()
        self._settle()

    # --- what has happened -------------------------------------------------------------------

    def _tell(self, kind: Literal["ask", "abort", "release"], outgoing: Outgoing) -> None:
        """On any thread."""
        self._happened.append(_Happened(kind, outgoing))
        self.wake()

    def _look(self) -> None:
        """On the timer's thread."""
        for session in [*self._sessions]:
            session.look(monotonic())
        if self._sessions:
            self._timer.at(monotonic() + LOOK_EVERY_S)

    def _settle(self) -> None:
        while self._happened:
            kind, outgoing = self._happened.popleft()
            if kind == "ask":
                self._asked(outgoing)
            elif kind == "abort":
                self._abort(outgoing)
            else:
                self._open.pop(outgoing.request_id, None)
                self.engine.scheduler.imports.release(outgoing.request_id)

    def _asked(self, outgoing: Outgoing) -> None:
        why_not = self._why_not(outgoing)
        if why_not is None and outgoing.session.take(outgoing):
            try:  # without text: nobody reads it
                self.engine.scheduler.add(self._request(outgoing))
            except InvalidRequest as error:
                why_not = str(error)
            else:
                self._open[outgoing.request_id] = outgoing
                self._computing.add(outgoing.request_id)
        if why_not is not None:
            outgoing.session.refuse(outgoing, why_not)

    def _why_not(self, outgoing: Outgoing) -> str | None:
        ask, scheduler = outgoing.ask, self.engine.scheduler
        size, num_tokens = self._hello.block_size, len(ask.token_ids)
        if num_tokens != size * (ask.first_block + ask.num_blocks):
            return f"{num_tokens} tokens are not the blocks that are asked for, of {size} each"
        if max(ask.token_ids) >= self._vocab_size:
            return f"token {max(ask.token_ids)} is outside the vocabulary of {self._vocab_size}"
        if len(self._open) >= MAX_ASKS:
            return f"{MAX_ASKS} prompts are computed or sent for others"
        held = sum([one.ask.first_block + one.ask.num_blocks for one in self._open.values()])
        most = scheduler.config.num_blocks // SENT_SHARE
        if held + ask.first_block + ask.num_blocks > most:
            return f"transfers hold {held} blocks, and may hold {most}"
        queue = sum(
            [r.num_uncomputed_tokens for r in (*scheduler.waiting, *scheduler.running.values())]
        )
        wait_s = self._choice.compute_s(queue + size * ask.num_blocks, 0)
        if wait_s > ask.deadline_s:
            return f"it would take {wait_s:.1f} s, and there are {ask.deadline_s:.1f} s"
        return None

    def _request(self, outgoing: Outgoing) -> Request:
        ask = outgoing.ask
        has_levels = self.engine.scheduler.config.scheduling_policy == "priority"
        return Request(
            request_id=outgoing.request_id,
            prompt_token_ids=ask.token_ids,
            sampling=ONE_TOKEN,
            max_tokens=1,
            seed=0,
            arrival_time=monotonic(),
            priority=ask.priority if has_levels else 0,
            tenant=ask.tenant,
            cache_salt=ask.cache_salt,
        )

    def _abort(self, outgoing: Outgoing) -> None:
        if outgoing.request_id in self._computing:
            self._computing.discard(outgoing.request_id)
            self.engine.abort(outgoing.request_id)

    def _ended(self, update: RequestUpdate) -> None:
        self._computing.discard(update.request_id)
        outgoing = self._open.get(update.request_id)
        if outgoing is None:
            return
        if update.finish_reason in (FinishReason.LENGTH, FinishReason.STOP):
            outgoing.session.computed(outgoing)
        else:
            outgoing.session.failed(outgoing, update.error or "its request ended too early")

    # --- what a step completes ---------------------------------------------------------------

    def begin_step(self, batch: ScheduledBatch) -> "_Sending | None":
        """Blocks that are there already are sent at once; those that this step completes, layer by
        layer while it runs. All are held from now on."""
        items = [item for item in batch.requests if item.request_id in self._open]
        if not items:
            return None
        # What is loaded from other tiers, or moved or looked at first, is another kind of step.
        others = [item for item in batch.requests if item.look is not None or item.moves]
        is_plain = not (batch.block_moves or others)
        step = SentStep(self._layers_done, is_streaming=is_plain)
        there: dict[PrefillSession, list[SentPiece]] = {}
        coming: dict[PrefillSession, list[SentPiece]] = {}
        for item in items:
            outgoing = self._open[item.request_id]
            if self._goes_back(outgoing, item):
                outgoing.session.failed(outgoing, "one of its steps failed, and was computed again")
                continue
            num_before = item.num_computed_tokens // self._hello.block_size
            self._take_blocks(outgoing, item, num_before, there if is_plain else coming)
            self._take_blocks(outgoing, item, item.end // self._hello.block_size, coming)
        for session, pieces in there.items():
            session.send(None, pieces)
        for session, pieces in coming.items():
            session.send(step, pieces)
        return _Sending(step, [self._open[item.request_id] for item in items])

    def _goes_back(self, outgoing: Outgoing, item: ScheduledRequest) -> bool:
        """Whether tokens are computed again in the same blocks, of which some may be sent."""
        is_again = item.epoch == outgoing.epoch and item.num_computed_tokens < outgoing.end
        outgoing.epoch, outgoing.end = item.epoch, item.end
        return is_again

    def _take_blocks(
        self,
        outgoing: Outgoing,
        item: ScheduledRequest,
        num_full: int,
        pieces: dict[PrefillSession, list[SentPiece]],
    ) -> None:
        """The next of its blocks, up to `num_full` of the prompt's."""
        ask, first = outgoing.ask, outgoing.num_begun
        blocks = item.block_table[ask.first_block + first : num_full]
        if not blocks:
            return
        outgoing.num_begun += len(blocks)
        self.engine.scheduler.imports.retain(outgoing.request_id, blocks)
        piece = SentPiece(outgoing, first, np.array(blocks, np.int32))
        pieces.setdefault(outgoing.session, []).append(piece)


class _Sending(NamedTuple):
    """A step that is sent while it runs."""

    step: SentStep
    outgoing: list[Outgoing]

    def end(self, *, has_failed: bool) -> None:
        if has_failed:  # what was sent of it may be anything
            for one in self.outgoing:
                one.session.failed(one, "a step of the engine failed")
        self.step.end(has_failed=has_failed)


class _Result(NamedTuple):
    pending: Pending
    sending: _Sending

    def result(self) -> StepOutput:
        try:
            output = self.pending.result()
        except BaseException:
            self.sending.end(has_failed=True)
            raise
        self.sending.end(has_failed=False)
        return output


class _Watched(NamedTuple):
    """The executor, whose steps are sent."""

    executor: Executor
    side: PrefillSide

    def submit(self, batch: ScheduledBatch) -> Pending:
        sending = self.side.begin_step(batch)
        if sending is None:
            return self.executor.submit(batch)
        try:
            pending = self.executor.submit(batch)
        except BaseException:
            sending.end(has_failed=True)
            raise
        return _Result(pending, sending)


def _nobody() -> None:
    """Nobody sleeps."""
