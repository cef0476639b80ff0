"""The prefill side's end of one link: what was asked for over it, and what of that is sent.

Its own thread sends; the link's threads tell what came; the engine's thread says what is computed.
All of them meet at a lock that is held for moments. Knows no scheduler.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from duetto.cluster.disaggregation import protocol
from duetto.cluster.disaggregation.counts import TransferCounts
from duetto.cluster.disaggregation.kv_frames import (
    MAX_REASON,
    AskPrefill,
    FromPrefill,
    GotPrefill,
    KVHello,
    KVUnfit,
    KVWelcome,
    PrefillDone,
    PrefillRefused,
    encode_kv_frame,
    read_from_decode,
    why_unfit,
)
from duetto.cluster.disaggregation.peer import LayerRows
from duetto.cluster.disaggregation.protocol import (
    AbortPrefill,
    Actions,
    OutgoingKV,
    ReturnBlocks,
    Say,
)
from duetto.cluster.disaggregation.sending import SentStep
from duetto.cluster.frames import FrameError
from duetto.cluster.links.link import BlockRows, LinkEnd, LinkLost, RowsSent

logger = logging.getLogger(__name__)

GOT_WITHIN_S = 60.0  # after all was sent: who says nothing so long is taken for dead
MAX_OPEN = 256  # transfers of one link
MAX_BLOCKS_AT_ONCE = 256  # in one call of the link: a cancel waits for no more


class Outgoing:
    """A transfer that is computed here. Its session's lock guards `kv`."""

    def __init__(self, session: "PrefillSession", ask: AskPrefill) -> None:
        self.session = session
        self.ask = ask
        self.request_id = f"kv-{session.number}-{ask.transfer_id}"
        num_rows = session.num_layers * ask.num_blocks
        self.kv = protocol.begin_outgoing(ask.transfer_id, num_rows)
        self.computed_time: float | None = None
        # Written by the engine's thread alone:
        self.num_begun = 0  # of its blocks: given to the session to be sent
        self.end = 0  # tokens computed by steps so far ...
        self.epoch = 0  # ... since so many preemptions


class SentPiece(NamedTuple):
    """Blocks of one transfer that a step completes."""

    outgoing: Outgoing
    first: int  # of the transfer's blocks
    blocks: NDArray[np.int32]


class _Rows(NamedTuple):
    """What a step completes; None: it was there before."""

    step: SentStep | None
    pieces: Sequence[SentPiece]


class SessionUser(NamedTuple):
    """What a session tells, on any thread."""

    ask: Callable[[Outgoing], None]
    abort: Callable[[Outgoing], None]  # nobody wants it any more
    release: Callable[[Outgoing], None]  # nobody reads its blocks any more
    over: Callable[["PrefillSession"], None]


class PrefillSession:
    """One connection. A LinkUser; `serve` gives it its link."""

    def __init__(
        self,
        number: int,
        hello: KVHello,
        rows: LayerRows,
        user: SessionUser,
        counts: TransferCounts,
    ) -> None:
        self.number = number
        self.num_layers = len(rows)
        self._hello = hello
        self._rows = rows
        self._row_bytes = [sum([a.shape[1] for a in arrays]) for arrays in rows]
        self._user = user
        self._counts = counts
        self._lock = Lock()
        self._transfers: dict[int, Outgoing] = {}
        self._last_id = -1
        self._is_welcome = False
        self._is_over = False
        self._unacknowledged: deque[tuple[float, Outgoing]] = deque()  # when it was sent
        self._outbox: SimpleQueue[FromPrefill | _Rows | None] = SimpleQueue()
        self._link: LinkEnd | None = None
        self._thread = Thread(target=self._run, name="duetto-kv-sender", daemon=True)

    def serve(self, link: LinkEnd) -> None:
        """Begin to send. What came before waits."""
        self._link = link
        self._thread.start()

    # --- on the engine's thread --------------------------------------------------------------

    def take(self, outgoing: Outgoing) -> bool:
        """It will be computed; False if it is over already."""
        self._change(outgoing, protocol.on_taken)
        return outgoing.kv.phase == "computing"

    def refuse(self, outgoing: Outgoing, reason: str) -> None:
        if self._change(outgoing, lambda kv: protocol.on_failed(kv, reason[:MAX_REASON])):
            self._counts.num_refused += 1

    def send(self, step: SentStep | None, pieces: Sequence[SentPiece]) -> None:
        """Send blocks, layer by layer, as the step computes them."""
        self._outbox.put(_Rows(step, pieces))

    def computed(self, outgoing: Outgoing) -> None:
        """Its request has ended well."""
        outgoing.computed_time = monotonic()
        self._change(outgoing, protocol.on_computed)

    def failed(self, outgoing: Outgoing, reason: str) -> None:
        """Its request has not, or what was sent of it may be wrong."""
        if self._change(outgoing, lambda kv: protocol.on_failed(kv, reason[:MAX_REASON])):
            self._counts.num_failed += 1

    def look(self, now: float) -> None:
        """Close the link to who does not say what it has got."""
        waits = self._unacknowledged
        while waits and waits[0][1].kv.phase == "over":
            waits.popleft()
        if waits and now - waits[0][0] > GOT_WITHIN_S:
            self.close("what was sent is not acknowledged")

    def close(self, reason: str = "it was closed here") -> None:
        """End the connection; any thread but a link's, which tells of the end itself."""
        logger.info("a KV link ends: %s", reason)
        if self._link is not None:
            self._link.close()
        self._end()

    # --- on the link's threads ---------------------------------------------------------------

    def received(self, frame: bytes) -> None:
        try:
            self._read(frame)
        except FrameError as error:
            logger.error("a KV link is closed: %s", error)
            self._outbox.put(None)

    def places(self, rows: RowsSent) -> BlockRows | None:  # noqa: ARG002
        """Nobody sends rows to the one that computes them."""
        return None

    def arrived(self, rows: RowsSent) -> None: ...

    def lost(self, reason: str) -> None:
        logger.info("a KV link is lost: %s", reason)
        self._end()

    # --- inside ------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        frame = read_from_decode(data)
        if isinstance(frame, KVHello):
            reason = why_unfit(self._hello, frame)
            self._is_welcome = reason is None
            self._outbox.put(KVWelcome() if reason is None else KVUnfit(reason[:400]))
            if reason is not None:
                logger.error("an engine that asks for KV is refused: %s", reason)
        elif not self._is_welcome:
            raise FrameError("who asks for KV must say first what it is")
        elif isinstance(frame, AskPrefill):
            self._ask(frame)
        elif frame.transfer_id > self._last_id:
            raise FrameError(f"transfer {frame.transfer_id} was never asked for")
        elif (outgoing := self._transfers.get(frame.transfer_id)) is None:
            return  # it is over here too
        elif isinstance(frame, GotPrefill):
            self._got(outgoing)
        else:
            self._change(outgoing, protocol.on_cancel)

    def _ask(self, ask: AskPrefill) -> None:
        if ask.transfer_id <= self._last_id:
            raise FrameError(f"transfer {ask.transfer_id} is asked for twice")
        self._last_id = ask.transfer_id
        if len(self._transfers) >= MAX_OPEN:
            self._counts.num_refused += 1
            self._outbox.put(PrefillRefused(ask.transfer_id, f"{MAX_OPEN} transfers are open"))
            return
        outgoing = Outgoing(self, ask)
        with self._lock:
            self._transfers[ask.transfer_id] = outgoing
        self._user.ask(outgoing)

    def _got(self, outgoing: Outgoing) -> None:
        if outgoing.kv.phase == "sent" and outgoing.computed_time is not None:
            self._counts.num_exported += 1
            self._counts.exposed_s += monotonic() - outgoing.computed_time
        self._change(outgoing, protocol.on_got)

    def _change(
        self, outgoing: Outgoing, rule: Callable[[OutgoingKV], tuple[OutgoingKV, Actions]]
    ) -> bool:
        """Whether there was something to do."""
        with self._lock:
            outgoing.kv, actions = rule(outgoing.kv)
            if outgoing.kv.phase == "over" and not outgoing.kv.is_reading:
                self._transfers.pop(outgoing.ask.transfer_id, None)
        for action in actions:
            match action:
                case Say(frame):
                    self._outbox.put(cast(FromPrefill, frame))
                    if isinstance(frame, PrefillDone):
                        self._unacknowledged.append((monotonic(), outgoing))
                case AbortPrefill():
                    self._user.abort(outgoing)
                case ReturnBlocks():
                    self._user.release(outgoing)
        return bool(actions)

    def _end(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            transfers = [*self._transfers.values()]
        for outgoing in transfers:
            self._change(outgoing, protocol.on_outgoing_lost)
        self._outbox.put(None)
        self._user.over(self)

    # --- on the thread that sends ------------------------------------------------------------

    def _run(self) -> None:
        link = self._link
        assert link is not None
        try:
            while (what := self._outbox.get()) is not None:
                if isinstance(what, _Rows):
                    self._send_rows(link, what)
                else:
                    link.send(encode_kv_frame(what))
                    if isinstance(what, KVUnfit):
                        break
        except (LinkLost, OSError) as error:
            self.close(str(error))
            return
        self.close()

    def _send_rows(self, link: LinkEnd, what: _Rows) -> None:
        for layer in range(self.num_layers):
            if what.step is not None and not what.step.wait(layer):
                return  # its transfers have failed
            for piece in what.pieces:
                for start in range(0, len(piece.blocks), MAX_BLOCKS_AT_ONCE):
                    self._send_piece(link, layer, piece, start)

    def _send_piece(self, link: LinkEnd, layer: int, piece: SentPiece, start: int) -> None:
        outgoing, blocks = piece.outgoing, piece.blocks[start : start + MAX_BLOCKS_AT_ONCE]
        with self._lock:
            outgoing.kv, may_read = protocol.may_read(outgoing.kv)
        if not may_read:
            return  # nobody wants it any more
        number, num_sent = outgoing.ask.transfer_id, 0
        try:
            rows = RowsSent(number, layer, piece.first + start, len(blocks))
            link.send_rows(rows, BlockRows(self._rows[layer], blocks))
            num_sent = len(blocks)
            self._counts.num_bytes_out += num_sent * self._row_bytes[layer]
        finally:
            self._change(outgoing, lambda kv: protocol.on_sent(kv, num_sent))
