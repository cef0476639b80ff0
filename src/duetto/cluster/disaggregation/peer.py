"""The decode side's end of one link: what was asked there, and where its rows are written.

Its own thread connects and sends; the link's threads tell what came; the engine's thread asks and
cancels. All of them meet at a lock that is held for moments. Knows no scheduler.
"""

import logging
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import cast

import numpy as np
from numpy.typing import NDArray

from duetto.cluster.disaggregation import protocol
from duetto.cluster.disaggregation.counts import TransferCounts
from duetto.cluster.disaggregation.kv_frames import (
    AskPrefill,
    FromDecode,
    KVHello,
    KVUnfit,
    KVWelcome,
    PrefillAccepted,
    PrefillDone,
    PrefillRefused,
    encode_kv_frame,
    read_from_prefill,
)
from duetto.cluster.disaggregation.protocol import (
    Actions,
    GiveUpCause,
    IncomingKV,
    Say,
    TransferAction,
)
from duetto.cluster.frames import FrameError
from duetto.cluster.links.link import ArenaRows, BlockRows, LinkEnd, LinkLost, LinkUser, RowsSent
from duetto.core.errors import DuettoError

logger = logging.getLogger(__name__)

LayerRows = Sequence[Sequence[ArenaRows]]  # of an arena: the arrays of each layer
OpenLink = Callable[[str, LinkUser], LinkEnd]  # to an address; raises LinkLost or ConfigError
RETRY_AFTER_S = 2.0  # a link that could not be opened, or was lost
RETRY_UNFIT_S = 60.0  # one to an engine of another model, say


class Incoming:
    """A transfer that was asked for. Its peer's lock guards `kv`, and the times."""

    def __init__(self, kv: IncomingKV, blocks: Sequence[int], ask: AskPrefill) -> None:
        self.kv = kv
        self.ask = ask
        self.blocks: NDArray[np.int32] = np.array(blocks, np.int32)
        self.first_time: float | None = None  # when rows began to come
        self.last_time = 0.0  # when they came last


Tell = Callable[[Incoming, tuple[TransferAction, ...]], None]


class PrefillPeer:
    """One connection, from its opening to its end; another one to the same address is another
    peer. What is to be done on the engine's thread is told by `tell`, on any thread."""

    def __init__(
        self,
        address: str,
        hello: KVHello,
        rows: LayerRows,
        open_link: OpenLink,
        tell: Tell,
        counts: TransferCounts,
    ) -> None:
        self.address = address
        self.num_layers = len(rows)
        self.closed_until: float | None = None  # None: it is open, or about to be
        self._hello = hello
        self._rows = rows
        self._row_bytes = [sum([a.shape[1] for a in arrays]) for arrays in rows]
        self._open_link = open_link
        self._tell = tell
        self._counts = counts
        self._lock = Lock()
        self._transfers: dict[int, Incoming] = {}
        self._next_id = 1
        self._is_over = False
        self._outbox: SimpleQueue[FromDecode | None] = SimpleQueue()
        self._link: LinkEnd | None = None
        self._thread = Thread(target=self._run, name="duetto-kv-peer", daemon=True)
        self._thread.start()

    # --- on the engine's thread --------------------------------------------------------------

    def ask(
        self,
        blocks: Sequence[int],
        first_block: int,
        token_ids: tuple[int, ...],
        *,
        salt: bytes,
        tenant: bytes,
        priority: int,
        deadline_s: float,
    ) -> Incoming:
        """Ask for the KV of blocks, which is written into `blocks`. What becomes of it is told."""
        with self._lock:
            number, self._next_id = self._next_id, self._next_id + 1
            ask = AskPrefill(
                number, token_ids, salt, tenant, priority, first_block, len(blocks), deadline_s
            )
            kv = protocol.begin_incoming(number, self.num_layers, len(blocks))
            incoming = Incoming(kv, blocks, ask)
            self._transfers[number] = incoming
            is_over = self._is_over
        if is_over:
            self._change(number, lambda kv: protocol.on_incoming_lost(kv, "its link is lost"))
        else:
            self._outbox.put(ask)
        return incoming

    def cancel(self, incoming: Incoming, cause: GiveUpCause) -> None:
        """Nobody waits for it any more. It is told that blocks are free when they are."""
        self._change(incoming.kv.transfer_id, lambda kv: protocol.cancel(kv, cause, cause))

    def close(self, reason: str = "it was closed here", retry_after_s: float = 0.0) -> None:
        """End the connection; any thread but a link's, which tells of the end itself."""
        link = self._link
        if link is not None:
            link.close()  # afterwards it writes nowhere, and tells nothing
        self._end(reason, retry_after_s)

    # --- on the link's threads ---------------------------------------------------------------

    def received(self, frame: bytes) -> None:
        try:
            read = read_from_prefill(frame)
        except FrameError as error:
            self._break(str(error))
            return
        match read:
            case KVWelcome():
                return
            case KVUnfit(reason):
                logger.error(
                    "the engine at %s cannot prefill for this one: %s", self.address, reason
                )
                self._break(reason, RETRY_UNFIT_S)
            case PrefillAccepted(number):
                self._change(number, protocol.on_accepted)
            case PrefillRefused(number, reason):
                self._change(number, lambda kv: protocol.on_refused(kv, reason))
            case PrefillDone(number, num_rows):
                self._change(number, lambda kv: protocol.on_done(kv, num_rows))

    def places(self, rows: RowsSent) -> BlockRows | None:
        with self._lock:
            incoming = self._transfers.get(rows.transfer_id)
            if incoming is None:
                return None
            incoming.kv, actions, is_wanted = protocol.on_rows(incoming.kv, rows)
            if is_wanted and incoming.first_time is None:
                incoming.first_time = monotonic()
            self._forget_if_over(incoming)
        self._act(incoming, actions)
        if not is_wanted:
            return None
        blocks = incoming.blocks[rows.first : rows.first + rows.num_blocks]
        return BlockRows(self._rows[rows.layer], blocks)

    def arrived(self, rows: RowsSent) -> None:
        self._counts.num_bytes_in += rows.num_blocks * self._row_bytes[rows.layer]
        self._change(rows.transfer_id, lambda kv: protocol.on_written(kv, rows))

    def lost(self, reason: str) -> None:
        logger.warning("the KV link to %s is lost: %s", self.address, reason)
        self._end(reason, RETRY_AFTER_S)

    # --- inside ------------------------------------------------------------------------------

    def _change(
        self, number: int, rule: Callable[[IncomingKV], tuple[IncomingKV, Actions]]
    ) -> None:
        with self._lock:
            incoming = self._transfers.get(number)
            if incoming is None:
                return  # it is over: frames of it may come still
            incoming.kv, actions = rule(incoming.kv)
            incoming.last_time = monotonic()
            self._forget_if_over(incoming)
        self._act(incoming, actions)

    def _forget_if_over(self, incoming: Incoming) -> None:
        if incoming.kv.phase == "over":
            self._transfers.pop(incoming.kv.transfer_id, None)

    def _act(self, incoming: Incoming, actions: Actions) -> None:
        told = []
        for action in actions:
            if isinstance(action, Say):
                self._outbox.put(cast(FromDecode, action.frame))
            else:
                told.append(action)
        if told:
            self._tell(incoming, tuple(told))

    def _break(self, reason: str, retry_after_s: float = RETRY_AFTER_S) -> None:
        """The other side breaks the rules. On a link's thread, which cannot wait for itself."""
        if retry_after_s < RETRY_UNFIT_S:
            logger.error("the KV link to %s is closed: %s", self.address, reason)
        self.closed_until = monotonic() + retry_after_s
        self._outbox.put(None)

    def _end(self, reason: str, retry_after_s: float) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            self.closed_until = max(self.closed_until or 0.0, monotonic() + retry_after_s)
            numbers = [*self._transfers]
        for number in numbers:
            self._change(number, lambda kv: protocol.on_incoming_lost(kv, reason))
        self._outbox.put(None)

    def _run(self) -> None:
        try:
            self._link = self._open_link(self.address, self)
            self._link.send(encode_kv_frame(self._hello))
            while (frame := self._outbox.get()) is not None:
                self._send(self._link, frame)
        except (LinkLost, DuettoError, OSError) as error:
            if self._link is None:
                logger.warning("no KV link to %s: %s", self.address, error)
            self.close(str(error), RETRY_AFTER_S)
            return
        self.close()

    def _send(self, link: LinkEnd, frame: FromDecode) -> None:
        try:
            data = encode_kv_frame(frame)
        except FrameError as error:
            assert isinstance(frame, AskPrefill)
            reason = str(error)
            self._change(frame.transfer_id, lambda kv: protocol.on_refused(kv, reason))
            return
        link.send(data)
