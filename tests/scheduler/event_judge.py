"""A log of KV events whose listener's picture is compared with the pool after every step."""

from collections.abc import Sequence

from duetto.core.config import SchedulerConfig
from duetto.scheduler.block_pool import next_hash, root_hash
from duetto.scheduler.kv_events import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    KVEvent,
    KVEventLog,
)
from duetto.scheduler.scheduler import Scheduler

SALTS = (b"", b"a")  # those of the walks


class JudgedLog(KVEventLog):
    """Attaches itself. Raises if anything that it is told is wrong."""

    def __init__(self, scheduler: Scheduler, max_waiting: int = 8192) -> None:
        super().__init__(scheduler.config.block_size, self.hear, max_waiting)
        self.scheduler = scheduler
        self.index: dict[bytes, None] = {}
        self.num = dict.fromkeys((BlocksStored, BlocksRemoved, BlocksCleared), 0)
        self.num_judged = self.most_at_once = 0
        self._partial: set[bytes] = set()  # of texts: blocks that are not full
        self._is_full = False
        scheduler.pool.events = self

    def hand_on(self) -> None:
        super().hand_on()
        self._learn_partial()
        if not self._is_full:
            self.judge()

    def judge(self) -> None:
        published = self.scheduler.pool._block_of.keys() - self._partial
        assert self.index.keys() == published, "the index is not the pool's"
        assert self.published() == tuple(self.index), "who has missed some would be told otherwise"
        self.num_judged += 1

    def hear(self, events: Sequence[KVEvent]) -> None:
        assert events
        count = 0
        for event in events:
            self.num[type(event)] += 1
            match event:
                case BlocksStored():
                    count += len(event.hashes)
                    judge_stored(event, self.scheduler.config)
                    assert not self.index.keys() & set(event.hashes), "it is there already"
                    self.index |= dict.fromkeys(event.hashes)
                case BlocksRemoved(hashes):
                    count += len(hashes)
                    for block_hash in hashes:
                        del self.index[block_hash]  # never one that is not there
                case BlocksCleared():
                    self.index.clear()
        self.most_at_once = max(self.most_at_once, count)

    def _count(self, count: int) -> None:
        self._is_full = True  # in the middle of a step
        super()._count(count)
        self._is_full = False

    def _learn_partial(self) -> None:
        size = self.scheduler.config.block_size
        for request in self.scheduler.running.values():
            for source in request.sources:
                if len(source.token_ids) % size:
                    self._partial.add(source.hashes[-1])


def judge_stored(event: BlocksStored, config: SchedulerConfig) -> None:
    """Its hashes follow from its tokens, and from what it says of what is before them."""
    size = config.block_size
    assert event.block_size == size
    assert len(event.token_ids) == size * len(event.hashes)
    salts = [salt for salt in SALTS if bool(salt) == event.is_salted]
    parents = [event.parent] if event.parent else [root_hash(config.cache_namespace, salts[0])]
    for index, block_hash in enumerate(event.hashes):
        parent = parents[-1]
        assert block_hash == next_hash(parent, event.token_ids[index * size : (index + 1) * size])
        parents.append(block_hash)
