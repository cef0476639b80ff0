"""In the end the index is the pool, whatever was lost, doubled, late or begun anew."""

from collections import deque
from random import Random

import pytest

from duetto.cluster.events.buffer import EventBuffer, SentBatch
from duetto.cluster.events.format import ALL, END, EventWriter, MalformedEvents, write_seq
from duetto.cluster.events.stream import BatchStream, DirectSink
from duetto.routing.prefix_index import PrefixIndex
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

HASHES = [bytes([number]) * 32 for number in range(40)]


class Worker:
    """A pool that changes at random, its publisher, and a network that loses what it likes."""

    def __init__(self, rng: Random, *, is_vllm: bool, max_batches: int) -> None:
        self.rng, self.is_vllm, self.max_batches = rng, is_vllm, max_batches
        self.pool: set[bytes] = set()
        self.live: deque[SentBatch] = deque()  # on their way to who subscribes
        self.answers: deque[SentBatch] = deque()
        self.start(0 if is_vllm else 1000)

    def start(self, first_seq: int) -> None:
        """A new process: an empty pool, and all connections are lost."""
        self.pool.clear()
        self.live.clear()
        self.answers.clear()
        self.buffer = EventBuffer(EventWriter(), first_seq, self.max_batches)
        self.next_seq = first_seq
        if not self.is_vllm:
            self.publish(BlocksCleared())

    def publish(self, event: KVEvent) -> None:
        self.live += self.buffer.add([event], 0.0)
        self.next_seq += 1

    def change(self) -> None:
        match self.rng.randrange(12):
            case 0:
                self.pool.clear()
                self.publish(BlocksCleared())
            case 1 | 2 | 3 | 4 if self.pool:
                gone = (self.rng.choice(sorted(self.pool)),)
                self.pool.difference_update(gone)
                self.publish(BlocksRemoved(gone))
            case _:
                new = tuple(set(self.rng.sample(HASHES, 3)) - self.pool)
                if new:
                    self.pool.update(new)
                    self.publish(BlocksStored(new, None, (1,) * len(new), 1, False))

    def answer(self, seq: int) -> None:
        if seq == ALL:
            batches = [] if self.is_vllm else [*self.buffer.all(0.0)]
        else:
            batches = self.buffer.since(seq)
        end = b"" if self.is_vllm else write_seq(len(batches))
        self.answers += [*batches, SentBatch(END, end)]


class Line:
    """Who drives a stream: one conversation at a time."""

    def __init__(self, worker: Worker, *, may_ask: bool = True) -> None:
        self.worker, self.index = worker, PrefixIndex()
        self.stream = BatchStream(DirectSink("w", self.index), may_ask=may_ask)
        self.num_sent = 0

    def talk(self) -> None:
        if self.stream.num_asked > self.num_sent:
            self.num_sent = self.stream.num_asked
            self.worker.answers.clear()  # a new conversation
            if self.stream.asking is not None:  # else it gave up
                self.worker.answer(self.stream.asking)

    def hear(self) -> None:
        if self.worker.live:
            self.stream.heard(*self.worker.live.popleft())
            self.talk()

    def read(self) -> None:
        if self.worker.answers:
            self.stream.answered(*self.worker.answers.popleft())
            self.talk()

    def settle(self) -> None:
        """Nothing is lost any more."""
        for _ in range(20):
            self.talk()
            while self.worker.live or self.worker.answers:
                self.hear()
                self.read()
            if self.stream.asking is not None:  # the answer was lost
                self.stream.ask_again()
            self.stream.check()
        self.talk()
        while self.worker.answers:
            self.read()
        assert self.stream.asking is None, "it asks for ever"

    @property
    def held(self) -> set[bytes]:
        return self.index.holding("w")


def live(rng: Random, line: Line, steps: int, losses: float) -> None:
    worker = line.worker
    for _ in range(steps):
        worker.change()
        if rng.random() < losses and worker.live:
            del worker.live[rng.randrange(len(worker.live))]
        if rng.random() < losses / 2 and worker.answers:
            del worker.answers[rng.randrange(len(worker.answers))]
        if rng.random() < 0.02:
            worker.start(0 if worker.is_vllm else worker.next_seq + rng.randint(1, 10_000))
        if rng.random() < 0.05:
            line.stream.check()
        if rng.random() < 0.03:
            worker.answers.clear()
            line.stream.ask_again()
        for _ in range(rng.randrange(3)):
            line.talk()
            rng.choice((line.hear, line.read))()


@pytest.mark.parametrize("seed", range(60))
def test_the_index_is_the_pool_once_all_is_quiet(seed):
    rng = Random(seed)
    worker = Worker(rng, is_vllm=False, max_batches=rng.choice([2, 5, 1000]))
    line = Line(worker)
    for _ in range(4):
        live(rng, line, 80, rng.choice([0.0, 0.1, 0.6]))
        line.settle()
        assert line.held == worker.pool


def test_the_walks_come_to_all_that_may_happen():
    gaps = snapshots = batches = 0
    for seed in range(10):
        rng = Random(seed)
        line = Line(Worker(rng, is_vllm=False, max_batches=5))
        live(rng, line, 200, 0.1)
        gaps += line.stream.num_gaps
        snapshots += line.stream.num_snapshots
        batches += line.stream.num_batches
    assert gaps > 20
    assert snapshots > 20
    assert batches > 150


@pytest.mark.parametrize("seed", range(40))
def test_of_vllms_workers_nothing_is_believed_that_is_not_there(seed):
    """They tell what they remember, and no more: of an older block nothing may be known. And a
    restart is seen by its numbers alone, once they are lower than those before."""
    rng = Random(seed)
    worker = Worker(rng, is_vllm=True, max_batches=rng.choice([3, 1000]))
    line = Line(worker)
    for _ in range(4):
        live(rng, line, 60, rng.choice([0.0, 0.2]))
        worker.start(0)
        line.stream.heard(*worker.buffer.add([BlocksCleared()], 0.0)[0])
        worker.next_seq += 1
        for _ in range(30):
            worker.change()
        line.settle()
        if worker.max_batches == 1000:
            assert line.held == worker.pool
        else:
            assert line.held <= worker.pool


def test_who_cannot_ask_begins_anew_after_a_gap():
    worker = Worker(Random(1), is_vllm=True, max_batches=5)
    line = Line(worker, may_ask=False)
    for number in range(5):
        worker.publish(BlocksStored((HASHES[number],), None, (1,), 1, False))
    del worker.live[2]
    while worker.live:
        line.hear()
    assert line.held == {HASHES[3], HASHES[4]}
    assert line.stream.num_asked == 0


def test_whom_nobody_answers_takes_what_comes_and_asks_later():
    worker = Worker(Random(1), is_vllm=False, max_batches=5)
    line = Line(worker)
    for number in range(4):
        worker.publish(BlocksStored((HASHES[number],), None, (1,), 1, False))
    line.talk()
    for _ in range(3):
        assert line.stream.asking is not None
        worker.answers.clear()
        line.stream.ask_again()
    while worker.live:
        line.hear()
    assert line.stream.asking is None
    worker.publish(BlocksStored((HASHES[9],), None, (1,), 1, False))
    line.hear()
    assert HASHES[9] in line.held
    line.settle()
    assert line.held == {*HASHES[:4], HASHES[9]}
    assert line.stream.num_snapshots == 1


def test_what_waits_for_an_answer_is_bounded():
    worker = Worker(Random(1), is_vllm=False, max_batches=3)
    line = Line(worker)
    for number in range(6000):
        kind = BlocksStored((HASHES[number % 40],), None, (1,), 1, False)
        worker.publish(kind if number % 80 < 40 else BlocksRemoved(kind.hashes))
    asked, worker.answers = line.stream.asking, deque()
    assert asked == ALL
    while worker.live:
        line.stream.heard(*worker.live.popleft())
    assert len(line.stream._held) < 5000
    line.settle()
    assert line.held == set(worker.buffer._there)


def test_what_is_malformed_is_told():
    line = Line(Worker(Random(1), is_vllm=False, max_batches=3))
    line.settle()
    with pytest.raises(MalformedEvents):
        line.stream.heard(1001, b"\x00")
    with pytest.raises(MalformedEvents):
        BatchStream(DirectSink("w", PrefixIndex()), may_ask=False).heard(END, b"\x92\x01\x90")
