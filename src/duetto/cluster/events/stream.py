"""What one worker's batches of events come to: in order, without a gap, or asked for again.

A pure state machine: no sockets, no clock. It is told what arrives, says what is to be asked, and
changes an index. In the end the index is the worker's pool, whatever was lost on the way; or, if
nobody can tell what was, it is empty and grows again.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from duetto.cluster.events.format import ALL, END, MalformedEvents, read_events
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

MAX_HELD = 4096  # batches that came while others were asked for
MAX_FRUITLESS = 3  # answers that lead nowhere; then the index begins anew


class BlockIndex(Protocol):
    """What of PrefixIndex is used; any thread may call it."""

    def stored(self, worker: str, hashes: Sequence[bytes]) -> int: ...

    def removed(self, worker: str, hashes: Sequence[bytes]) -> None: ...

    def cleared(self, worker: str) -> None: ...

    def left(self, worker: str) -> None: ...


class EventSink(Protocol):
    """Takes the events of one worker."""

    def take(self, events: Sequence[KVEvent]) -> None: ...


class DirectSink:
    """For workers whose hashes are ours."""

    def __init__(self, worker: str, index: BlockIndex) -> None:
        self._worker = worker
        self._index = index

    def take(self, events: Sequence[KVEvent]) -> None:
        for event in events:
            match event:
                case BlocksStored():
                    self._index.stored(self._worker, event.hashes)
                case BlocksRemoved(hashes):
                    self._index.removed(self._worker, hashes)
                case BlocksCleared():
                    self._index.cleared(self._worker)


class BatchStream:
    """Of one worker. Raises MalformedEvents for what is no batch; it is of no use any more then.

    Who drives it sends a question whenever `num_asked` has grown, and begins a new conversation if
    the one before was not answered to its end: an answer does not say what it is to.
    """

    def __init__(self, sink: EventSink, *, may_ask: bool = True) -> None:
        self._sink = sink
        self._may_ask = may_ask
        self._next: int | None = None  # the number that comes next, once that is known
        self._last_live: int | None = None
        self._held: deque[tuple[int, bytes]] = deque(maxlen=MAX_HELD)
        self.asking: int | None = None  # from which number on; ALL
        self.num_asked = 0
        self._num_answered = 0  # batches
        self._is_short = False  # the answer does not begin where it was to
        self._num_fruitless = 0
        self._tells_all: bool | None = None  # whether the publisher can be asked for all
        self._lacks = may_ask  # something is there that is not in the index
        self.num_batches = self.num_gaps = self.num_snapshots = self.num_restarts = 0
        self.check()

    def heard(self, seq: int, payload: bytes) -> None:
        """A batch, as it was published."""
        if self._last_live is not None and seq <= self._last_live:
            self._restarted()
        self._last_live = seq
        if self.asking is not None:
            self._held.append((seq, payload))
        elif self._next is None or seq == self._next:
            self._take(seq, payload)
        elif seq > self._next:
            self.num_gaps += 1
            if self._may_ask:
                self._held.append((seq, payload))
                self._ask(self._next)
            else:
                self._sink.take([BlocksCleared()])
                self._take(seq, payload)
        # else it was in an answer already

    def check(self) -> None:
        """It is quiet: ask whether something was missed."""
        if self._may_ask and self.asking is None:
            is_lost = self._next is None or (self._lacks and self._tells_all is not False)
            self._ask(ALL if is_lost or self._next is None else self._next)

    def ask_again(self) -> None:
        """The answer did not come, or not all of it."""
        if self.asking is not None:
            self._start_over()

    def answered(self, seq: int, payload: bytes) -> None:
        """A part of the answer."""
        if self.asking is None:
            return
        if seq == END:
            self._ended(payload)
            return
        self._num_answered += 1
        if self.asking == ALL or self._next is None or (seq == self._next and not self._is_short):
            self._take(seq, payload)  # the first one of all clears
        elif seq > self._next:
            self._is_short = True

    # --- what follows ------------------------------------------------------------------------

    def _ended(self, payload: bytes) -> None:
        is_whole = len(payload) != 8 or int.from_bytes(payload, "big") == self._num_answered
        if not is_whole or self._is_short:
            self._start_over()
        elif self.asking == ALL and not self._num_answered:  # vLLM's: it tells what it remembers
            self._tells_all = False
            self._begin_anew()
            self._ask(0)
        else:
            if self.asking == ALL:
                self._tells_all = True
                self.num_snapshots += 1
            if self.asking in (ALL, 0):
                self._lacks = False
            self._catch_up()

    def _catch_up(self) -> None:
        """The answer is whole: go on with what came beside it."""
        self.asking = None
        held, self._held = self._held, deque(maxlen=MAX_HELD)
        while held:
            seq, payload = held.popleft()
            if self._next is None or seq == self._next:
                self._take(seq, payload)
            elif seq > self._next:
                held.appendleft((seq, payload))
                self._held = held
                if self._num_answered:
                    self._ask(self._next)
                else:  # it does not have what it has sent: it is another one
                    self._start_over()
                return
        self._num_fruitless = 0

    def _start_over(self) -> None:
        """What was missed cannot be had: all that is there is asked for."""
        self._num_fruitless += 1
        if self._num_fruitless >= MAX_FRUITLESS:  # nobody answers: what comes is taken as it comes
            self._num_fruitless, self.asking = 0, None
            self._begin_anew()
            self._held.clear()
        elif self._tells_all is False:
            self._begin_anew()
            self._ask(0)
        else:
            self._ask(ALL)

    def _restarted(self) -> None:
        """Numbers begin again."""
        self.num_restarts += 1
        self._held.clear()
        self._tells_all = None
        self._begin_anew()
        if self._may_ask:
            self._ask(ALL)

    def _begin_anew(self) -> None:
        self._sink.take([BlocksCleared()])
        self._next, self._lacks = None, True

    def _ask(self, start: int) -> None:
        self.asking, self._num_answered, self._is_short = start, 0, False
        self.num_asked += 1

    def _take(self, seq: int, payload: bytes) -> None:
        if seq >= END:
            raise MalformedEvents(f"{seq} is no number of a batch")
        self._sink.take(read_events(payload).events)
        self._next = seq + 1
        self.num_batches += 1
