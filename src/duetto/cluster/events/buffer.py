"""What a publisher has said: its last batches, to say them again, and all blocks that are there,
for who has missed more. No sockets, no clock."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from duetto.cluster.events.format import EventWriter
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

MAX_BATCHES = 10_000  # as vLLM's buffer_steps
MAX_BUFFER_BYTES = 64 << 20


class SentBatch(NamedTuple):
    seq: int
    payload: bytes


class EventBuffer:
    """Gives batches their numbers. Bounded by count and bytes, and by what the pool can hold."""

    def __init__(
        self,
        writer: EventWriter,
        first_seq: int,
        max_batches: int = MAX_BATCHES,
        max_bytes: int = MAX_BUFFER_BYTES,
    ) -> None:
        self._writer = writer
        self._next_seq = first_seq
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._sent: deque[SentBatch] = deque()
        self._num_bytes = 0
        self._there: dict[bytes, None] = {}  # the oldest first
        self._block_size = 1

    def add(self, events: Sequence[KVEvent], time: float) -> list[SentBatch]:
        """The batches to send: one, if the events are not very many."""
        for event in events:
            self._note(event)
        batches = []
        for payload in self._writer.payloads(events, time):
            batch = SentBatch(self._next_seq, payload)
            self._next_seq += 1
            self._sent.append(batch)
            self._num_bytes += len(payload)
            batches.append(batch)
        while len(self._sent) > self._max_batches or self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._sent.popleft().payload)
        return batches

    def since(self, seq: int) -> list[SentBatch]:
        """Those of this number and later ones, as far as they are remembered."""
        if not self._sent or seq >= self._next_seq:
            return []
        first = max(0, seq - self._sent[0].seq)
        return [self._sent[index] for index in range(first, len(self._sent))]

    def all(self, time: float) -> Iterator[SentBatch]:
        """All that is there, as batches that bear the number of the last that was sent: the first
        of them begins with a clearance. Without tokens: this is for who knows our hashes."""
        there = BlocksStored(tuple(self._there), None, (), self._block_size, False)
        events: list[KVEvent] = [BlocksCleared()]
        if there.hashes:
            events.append(there)
        for payload in self._writer.payloads(events, time):
            yield SentBatch(self._next_seq - 1, payload)

    def _note(self, event: KVEvent) -> None:
        match event:
            case BlocksStored():
                self._block_size = event.block_size
                self._there |= dict.fromkeys(event.hashes)
            case BlocksRemoved(hashes):
                for block_hash in hashes:
                    self._there.pop(block_hash, None)
            case BlocksCleared():
                self._there.clear()
