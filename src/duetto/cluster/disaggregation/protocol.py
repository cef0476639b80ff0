"""One transfer of a prompt's KV between two engines, as the pure state machines of both sides.

A state is a value. Each event gives another state, and what is to be done; nothing here waits,
sends or looks at a clock. tests/cluster/disaggregation/test_protocol.py explores all states.

    asks      asked ──accepted──► coming ──done──► over (published)
                └──── refused, cancel, lost ────► draining ──nothing is being written──► over
    computes  computing ──all sent──► sent ──got──► over
                └──── failed, cancel, lost ─────► over, and blocks are free once nobody reads them

Rows that come for a transfer that is not `coming` are read and thrown away.
"""

from typing import Literal, NamedTuple

from duetto.cluster.disaggregation.kv_frames import (
    CancelPrefill,
    FromDecode,
    FromPrefill,
    GotPrefill,
    PrefillAccepted,
    PrefillDone,
    PrefillRefused,
)
from duetto.cluster.links.link import RowsSent

GiveUpCause = Literal["refused", "lost", "slow", "aborted", "broken"]


class Say(NamedTuple):
    """Send a frame, after all frames and rows that were sent before."""

    frame: FromDecode | FromPrefill


class PublishBlocks(NamedTuple):
    """All has come: the request finds it."""


class GiveUp(NamedTuple):
    """Nothing will come: the request is to be computed at home, or is wanted no more."""

    reason: str
    cause: GiveUpCause


class ReturnBlocks(NamedTuple):
    """Nobody reads or writes this transfer's blocks from now on."""


class AbortPrefill(NamedTuple):
    """Nobody wants what is being computed."""


TransferAction = Say | PublishBlocks | GiveUp | ReturnBlocks | AbortPrefill
Actions = tuple[TransferAction, ...]
IncomingPhase = Literal["asked", "coming", "draining", "over"]
OutgoingPhase = Literal["computing", "sent", "over"]


class IncomingKV(NamedTuple):
    """The side that asks, and writes what comes. It gives up or publishes once, and never both."""

    transfer_id: int
    num_layers: int
    num_blocks: int
    phase: IncomingPhase = "asked"
    begun: tuple[int, ...] = ()  # of each layer, a bit for each block that was or is written
    writing: frozenset[RowsSent] = frozenset()
    num_written: int = 0  # rows

    @property
    def num_rows(self) -> int:
        return self.num_layers * self.num_blocks

    @property
    def is_open(self) -> bool:
        return self.phase in ("asked", "coming")


def begin_incoming(transfer_id: int, num_layers: int, num_blocks: int) -> IncomingKV:
    """For who sends the ask."""
    return IncomingKV(transfer_id, num_layers, num_blocks, begun=(0,) * num_layers)


def on_accepted(kv: IncomingKV) -> tuple[IncomingKV, Actions]:
    if kv.phase == "coming":
        return cancel(kv, "it was accepted twice")
    return kv._replace(phase="coming") if kv.phase == "asked" else kv, ()


def on_refused(kv: IncomingKV, reason: str) -> tuple[IncomingKV, Actions]:
    return _give_up(kv, reason, "refused") if kv.is_open else (kv, ())


def on_rows(kv: IncomingKV, rows: RowsSent) -> tuple[IncomingKV, Actions, bool]:
    """Rows are about to come; whether they are to be written."""
    if kv.phase == "asked":
        return *cancel(kv, "rows came before it was accepted"), False
    if kv.phase != "coming":
        return kv, (), False
    if not _is_inside(kv, rows) or kv.begun[rows.layer] & _bits(rows):
        return *cancel(kv, f"rows came that were not asked for, or twice: {rows}"), False
    begun = list(kv.begun)
    begun[rows.layer] |= _bits(rows)
    return kv._replace(begun=tuple(begun), writing=kv.writing | {rows}), (), True


def on_written(kv: IncomingKV, rows: RowsSent) -> tuple[IncomingKV, Actions]:
    """The link touches their places no more. Others than those of `on_rows` are passed over."""
    if rows not in kv.writing:
        return kv, ()
    num_written = kv.num_written + rows.num_blocks
    return _drained(kv._replace(writing=kv.writing - {rows}, num_written=num_written))


def on_done(kv: IncomingKV, num_rows: int) -> tuple[IncomingKV, Actions]:
    if not kv.is_open:
        return kv, ()
    if kv.phase != "coming" or kv.writing or not num_rows == kv.num_written == kv.num_rows:
        came = f"{kv.num_written} of {kv.num_rows} rows came, and it said {num_rows}"
        return cancel(kv, f"it ended too early: {came}")
    return kv._replace(phase="over"), (Say(GotPrefill(kv.transfer_id)), PublishBlocks())


def cancel(
    kv: IncomingKV, reason: str, cause: GiveUpCause = "broken"
) -> tuple[IncomingKV, Actions]:
    """It takes too long, its request was aborted, or the other side breaks the rules."""
    if not kv.is_open:
        return kv, ()
    kv, actions = _give_up(kv, reason, cause)
    return kv, (Say(CancelPrefill(kv.transfer_id)), *actions)


def on_incoming_lost(kv: IncomingKV, reason: str) -> tuple[IncomingKV, Actions]:
    """The link is gone, and writes nothing any more."""
    kv = kv._replace(writing=frozenset())
    return _give_up(kv, reason, "lost") if kv.is_open else _drained(kv)


def _give_up(kv: IncomingKV, reason: str, cause: GiveUpCause) -> tuple[IncomingKV, Actions]:
    kv, actions = _drained(kv._replace(phase="draining"))
    return kv, (GiveUp(reason, cause), *actions)


def _drained(kv: IncomingKV) -> tuple[IncomingKV, Actions]:
    if kv.phase == "draining" and not kv.writing:
        return kv._replace(phase="over"), (ReturnBlocks(),)
    return kv, ()


def _is_inside(kv: IncomingKV, rows: RowsSent) -> bool:
    is_layer = 0 <= rows.layer < kv.num_layers
    return is_layer and rows.first >= 0 < rows.num_blocks <= kv.num_blocks - rows.first


def _bits(rows: RowsSent) -> int:
    return ((1 << rows.num_blocks) - 1) << rows.first


# --- the side that computes ------------------------------------------------------------------


class OutgoingKV(NamedTuple):
    """The side that computes, and reads what it sends."""

    transfer_id: int
    num_rows: int
    phase: OutgoingPhase = "computing"
    num_sent: int = 0
    is_computed: bool = False  # and was right: its request has ended as it should
    is_reading: bool = False


def begin_outgoing(transfer_id: int, num_rows: int) -> OutgoingKV:
    """It was asked for. Who computes takes it (`on_taken`), or does not (`on_failed`)."""
    return OutgoingKV(transfer_id, num_rows)


def on_taken(kv: OutgoingKV) -> tuple[OutgoingKV, Actions]:
    """It will be computed, unless it is over already."""
    is_wanted = kv.phase == "computing"
    return kv, (Say(PrefillAccepted(kv.transfer_id)),) if is_wanted else ()


def may_read(kv: OutgoingKV) -> tuple[OutgoingKV, bool]:
    """Whether rows may be read now, which ends with `on_sent`."""
    if kv.phase != "computing" or kv.is_reading:
        return kv, False
    return kv._replace(is_reading=True), True


def on_sent(kv: OutgoingKV, num_rows: int) -> tuple[OutgoingKV, Actions]:
    """Rows have been read and sent; 0 if the link could not take them."""
    kv = kv._replace(is_reading=False, num_sent=kv.num_sent + num_rows)
    return (kv, (ReturnBlocks(),)) if kv.phase == "over" else _sent_all(kv)


def on_computed(kv: OutgoingKV) -> tuple[OutgoingKV, Actions]:
    """The request has ended well: what was sent of it is right."""
    return _sent_all(kv._replace(is_computed=True))


def on_failed(kv: OutgoingKV, reason: str) -> tuple[OutgoingKV, Actions]:
    """The request has ended otherwise, or what was sent of it may be wrong."""
    if kv.phase != "computing":
        return kv, ()
    kv, actions = _over(kv)
    return kv, (Say(PrefillRefused(kv.transfer_id, reason)), *actions)


def on_got(kv: OutgoingKV) -> tuple[OutgoingKV, Actions]:
    """The other side has all, or claims to."""
    return _over(kv)


def on_cancel(kv: OutgoingKV) -> tuple[OutgoingKV, Actions]:
    return _over(kv)


def on_outgoing_lost(kv: OutgoingKV) -> tuple[OutgoingKV, Actions]:
    return _over(kv)


def _sent_all(kv: OutgoingKV) -> tuple[OutgoingKV, Actions]:
    if kv.phase == "computing" and kv.is_computed and kv.num_sent == kv.num_rows:
        return kv._replace(phase="sent"), (Say(PrefillDone(kv.transfer_id, kv.num_rows)),)
    return kv, ()


def _over(kv: OutgoingKV) -> tuple[OutgoingKV, Actions]:
    if kv.phase == "over":
        return kv, ()
    abort: Actions = () if kv.is_computed else (AbortPrefill(),)
    free: Actions = () if kv.is_reading else (ReturnBlocks(),)
    return kv._replace(phase="over"), (*abort, *free)
