"""What KV events cost: per step where nobody listens, per block to publish, to send and to index;
bytes of a block on the wire and in an index, as bitmaps and as sets of workers.

    python benchmarks/cluster/events.py [--workers 1000] [--blocks 400] [--shared 200]

The last line is JSON. Times are the best of several turns, of this process's own processor time.
"""

import argparse
import gc
import json
import platform
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from fakes import ShadowExecutor, make_request

from duetto.cluster.events.buffer import EventBuffer
from duetto.cluster.events.format import EventWriter, read_events
from duetto.cluster.events.publisher import EventPublisher, PublisherAddresses
from duetto.cluster.events.subscriber import EventSubscriber, Followed
from duetto.core.config import SchedulerConfig
from duetto.engine.engine import Engine
from duetto.routing.prefix_index import PrefixIndex
from duetto.scheduler.kv_events import BlocksRemoved, BlocksStored, KVEventLog
from duetto.scheduler.scheduler import Scheduler

BLOCK_SIZE = 16
RUN = 8  # blocks that are stored together
NUM_TURNS = 5


def best(work: Callable[[], object]) -> float:
    """Seconds of processor time."""
    times = []
    for _ in range(NUM_TURNS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def block(number: int) -> bytes:
    return sha256(number.to_bytes(8, "big")).digest()


def runs_of(count: int) -> list[BlocksStored]:
    events, parent = [], None
    for first in range(0, count, RUN):
        hashes = tuple([block(number) for number in range(first, first + RUN)])
        token_ids = tuple([number * 7919 % 150_000 for number in range(RUN * BLOCK_SIZE)])
        events.append(BlocksStored(hashes, parent, token_ids, BLOCK_SIZE, False))
        parent = hashes[-1]
    return events


def engine_step_s(*, listens: bool) -> float:
    """Of an engine whose model takes no time: 16 requests that decode; per step."""
    config = SchedulerConfig(num_blocks=4096, max_model_len=2048, block_size=BLOCK_SIZE)
    engine = Engine(Scheduler(config), ShadowExecutor(config.num_blocks, config.block_size))
    if listens:
        engine.scheduler.pool.events = KVEventLog(BLOCK_SIZE, lambda _events: None)
    for number in range(16):
        prompt = [number + 2, *[1] * 100]
        engine.add(make_request(f"r{number}", prompt, 1500))
    for _ in range(20):
        engine.step()
    start = time.process_time()
    for _ in range(600):
        engine.step()
    return (time.process_time() - start) / 600


def steps() -> dict[str, float]:
    off, on = [], []
    for _ in range(NUM_TURNS):  # in turns
        off.append(engine_step_s(listens=False))
        on.append(engine_step_s(listens=True))
    return {"step_us_nobody_listens": 1e6 * min(off), "step_us_listens": 1e6 * min(on)}


def wire() -> dict[str, float]:
    """Of events on their way, per block, in batches of one run, as a prefill makes them."""
    events = runs_of(8000)
    removed = [BlocksRemoved(event.hashes) for event in events]
    num = len(events) * RUN
    writer = EventWriter()

    def log() -> None:
        told = KVEventLog(BLOCK_SIZE, lambda _events: None)
        for event in events:
            told.stored(event.token_ids, event.hashes, range(RUN), is_salted=False)
            told.hand_on()

    payloads = [payload for event in events for payload in writer.payloads([event], 1e9)]
    gone = [payload for event in removed for payload in writer.payloads([event], 1e9)]
    write = best(lambda: [[*writer.payloads([event], 1e9)] for event in events])
    buffer = best(lambda: [EventBuffer(writer, 0).add([event], 1e9) for event in events])
    read = best(lambda: [read_events(payload) for payload in payloads])
    return {
        "log_us_per_block": 1e6 * best(log) / num,
        "write_us_per_block": 1e6 * write / num,
        "buffer_us_per_block": 1e6 * buffer / num,
        "read_us_per_block": 1e6 * read / num,
        "stored_bytes_per_block": sum(map(len, payloads)) / num,
        "removed_bytes_per_block": sum(map(len, gone)) / num,
    }


def index_times() -> dict[str, float]:
    hashes = [block(number) for number in range(20_000)]

    def store() -> None:
        index = PrefixIndex()
        for first in range(0, len(hashes), RUN):
            index.stored("w", hashes[first : first + RUN])

    full = PrefixIndex()
    full.stored("w", hashes)

    def remove_and_store() -> None:
        full.removed("w", hashes)
        full.stored("w", hashes)

    stored = best(store)
    return {
        "index_us_per_block": 1e6 * stored / len(hashes),
        "remove_and_store_us_per_block": 1e6 * best(remove_and_store) / len(hashes),
    }


class SetsOfWorkers:
    """The other way to keep it, to compare: a set of names for each block."""

    def __init__(self) -> None:
        self.holders: dict[bytes, set[str]] = {}

    def stored(self, worker: str, hashes: list[bytes]) -> None:
        for block_hash in hashes:
            self.holders.setdefault(block_hash, set()).add(worker)

    def cached(self, hashes: list[bytes]) -> dict[str, int]:
        counts: dict[str, int] = {}
        having = self.holders.get(hashes[0], set())
        for index, block_hash in enumerate(hashes):
            still = having & self.holders.get(block_hash, set())
            counts.update(dict.fromkeys(having - still, index))
            having = still
        return counts | dict.fromkeys(having, len(hashes))


def memory(
    make: Callable[[], PrefixIndex | SetsOfWorkers], num_workers: int, own: int, shared: int
) -> tuple[float, float, float, float]:
    """Bytes of an entry, and of a worker's block; microseconds to look up 128 blocks that all
    workers have, and 128 of which one has."""
    gc.collect()
    tracemalloc.start()
    index = make()
    common = [block(-1 - number & 0xFFFFFFFFFFFF) for number in range(shared)]
    for worker in range(num_workers):
        first = 1_000_000 * (worker + 1)
        hashes = [*common, *[block(first + number) for number in range(own)]]
        index.stored(f"worker {worker:08d}", hashes)
    num_entries = shared + num_workers * own
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    everywhere = common[:128]
    one = [block(1_000_000 + number) for number in range(min(own, 128))]
    looked = best(lambda: index.cached(everywhere)), best(lambda: index.cached(one))
    num_held = num_workers * (own + shared)
    return size / num_entries, size / num_held, 1e6 * looked[0], 1e6 * looked[1]


def indexes(num_workers: int, own: int, shared: int) -> dict[str, float]:
    found = {}
    for name, make in (("bitmaps", PrefixIndex), ("sets", SetsOfWorkers)):
        per_entry, per_held, everywhere, one = memory(make, num_workers, own, shared)
        found |= {
            f"{name}_bytes_per_entry": per_entry,
            f"{name}_bytes_per_block_of_a_worker": per_held,
            f"{name}_lookup_us_all_workers_have_128": everywhere,
            f"{name}_lookup_us_one_worker_has_128": one,
        }
    return found


def through_sockets() -> dict[str, float]:
    """From `publish` to the index, over loopback: wall time, and what the engine's thread pays."""
    index, events = PrefixIndex(), runs_of(40_000)
    publisher = EventPublisher(PublisherAddresses("tcp://127.0.0.1:*"))
    subscriber = EventSubscriber(index)
    try:
        subscriber.follow(Followed("w", publisher.events, publisher.replay))
        publisher.publish(events[:1])
        wait(index, RUN)
        start, paid = time.perf_counter(), time.thread_time()
        for event in events[1:]:
            publisher.publish([event])
        paid = time.thread_time() - paid
        wait(index, len(events) * RUN)
        took = time.perf_counter() - start
        delays = []
        for number in range(100):
            before = index.num_blocks("w")
            start = time.perf_counter()
            publisher.publish(
                [BlocksStored((block(-2 - number & 0xFFFFFFFF),), None, (), 1, False)]
            )
            wait(index, before + 1)
            delays.append(time.perf_counter() - start)
            time.sleep(0.002)
    finally:
        subscriber.close()
        publisher.close()
    num = (len(events) - 1) * RUN
    return {
        "publish_us_per_event": 1e6 * paid / (len(events) - 1),
        "blocks_per_s_to_the_index": num / took,
        "delay_ms_median": 1e3 * sorted(delays)[50],
        "delay_ms_p99": 1e3 * sorted(delays)[98],
    }


def wait(index: PrefixIndex, count: int) -> None:
    while index.num_blocks("w") < count:
        time.sleep(0.0001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=400, help="of each worker alone")
    parser.add_argument("--shared", type=int, default=200, help="that all workers have")
    args = parser.parse_args()
    found = steps() | wire() | index_times() | through_sockets()
    found |= indexes(args.workers, args.blocks, args.shared)
    found = {name: float(f"{value:.4g}") for name, value in found.items()}
    for name, value in found.items():
        print(f"{name:45} {value:12,.3f}")
    about = {
        "machine": platform.processor() or platform.machine(),
        "workers": args.workers,
        "blocks": args.blocks,
        "shared": args.shared,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(about | found))


if __name__ == "__main__":
    main()
