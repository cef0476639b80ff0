"""What does a router cost per request, and what would it cost at a thousand workers?

    python benchmarks/cluster/router.py
    python benchmarks/cluster/router.py --requests 2000 --workers 4 --prompt 1000
    python benchmarks/cluster/router.py --scale

Engines are fakes that answer at once with a first token and an end, so what is measured is the
router alone, on one core: from a request until its worker's handle has it (`add`), and all that is
done for it until its final update is handed over (`in all`, in the thread's own time). Policies
take turns, round by round. A tenth of the requests begin with one of ten texts, a tenth of a prompt
long. `--scale` measures the parts that grow with the cluster, at a thousand workers: a choice
between them, the index of their blocks, the batches of their KV events; and says what they come to
at 100,000 requests/s. The last line of stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import tracemalloc
from concurrent.futures import Future
from time import perf_counter, thread_time
from typing import Any, get_args

from duetto.cluster.events.format import EventWriter, read_events
from duetto.cluster.routed_worker import RoutedWorker
from duetto.cluster.router import RoutedEngine
from duetto.core.batch import RequestUpdate, SampledToken, StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.request import FinishReason, Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape
from duetto.engine.engine import StepReport
from duetto.routing.policies import RouterName, make_policy
from duetto.routing.predicted_wait import WaitPrices
from duetto.routing.prefix_index import PrefixIndex
from duetto.scheduler.kv_events import BlocksStored

CONFIG = SchedulerConfig(num_blocks=20_000, max_model_len=32_768, block_size=32)
RATE = 100_000  # requests/s of the largest cluster
SCALE_WORKERS = 1000
SCALE_BLOCKS = 400  # of each, in the index


def step_time(shape: BatchShape) -> float:
    return 0.004 + 2e-5 * shape.num_tokens + 1e-9 * sum(r.num_past for r in shape.requests)


class FakeEngine:
    """A handle that has each answer ready."""

    is_alive, has_failed, has_work, computing, last_progress_time = True, False, False, None, 0.0

    def __init__(self) -> None:
        self.got: list[str] = []

    def add(self, request: Request) -> None:
        self.got.append(request.request_id)

    def abort(self, request_id: str) -> None:
        pass

    def control(self, _message: object) -> "Future[Any]":
        return Future()

    def start(self) -> None:
        pass

    def stop(self, _timeout: float) -> bool:
        return True

    def give_up(self) -> None:
        pass

    def reports(self) -> list[StepReport]:
        """Of a step with all first tokens, and one with all ends."""
        first = tuple([RequestUpdate(name, (SampledToken(1),)) for name in self.got])
        last = tuple(
            [
                RequestUpdate(n, (SampledToken(2),), finish_reason=FinishReason.STOP)
                for n in self.got
            ]
        )
        ids, self.got = tuple(self.got), []
        record = StepRecord(0.0, 0.004, 8, 0, 8, 8, 0, 900, 1000, 0, 0, 0, request_ids=ids)
        return [StepReport(first, record), StepReport(last, record)]


def prompts(count: int, size: int, seed: int) -> list[tuple[int, ...]]:
    source = random.Random(seed)
    shared = [[source.randrange(32_000) for _ in range(size // 10)] for _ in range(10)]
    made = []
    for _ in range(count):
        begin = shared[source.randrange(10)] if source.random() < 0.1 else []
        own = [source.randrange(32_000) for _ in range(size - len(begin))]
        made.append((*begin, *own))
    return made


def request_of(number: int, prompt: tuple[int, ...]) -> Request:
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        max_tokens=2,
        seed=number,
    )


def make_router(name: RouterName, num_workers: int) -> tuple[RoutedEngine, list[FakeEngine]]:
    router = RoutedEngine(make_policy(name, WaitPrices(step_time, CONFIG)))
    engines = [FakeEngine() for _ in range(num_workers)]
    for i, engine in enumerate(engines):
        router.join(
            lambda number, engine=engine, i=i: RoutedWorker(f"w{i}", number, CONFIG, engine)
        )
    return router, engines


def measure(
    name: RouterName, num_workers: int, texts: list[tuple[int, ...]]
) -> tuple[list[float], float]:
    """Seconds of each `add`, and of all that is done for a request."""
    router, engines = make_router(name, num_workers)
    requests = [request_of(i, text) for i, text in enumerate(texts)]
    adds: list[float] = []
    in_all = 0.0  # of this thread: others may share the core
    for start in range(0, len(requests), 8):  # eight under way at a time
        began = thread_time()
        for request in requests[start : start + 8]:
            before = perf_counter()
            router.add(request)
            adds.append(perf_counter() - before)
        in_all += thread_time() - began
        reports = [
            (engine, report) for engine in engines if engine.got for report in engine.reports()
        ]
        began = thread_time()
        for engine, report in reports:
            router.take(engine, report)
        in_all += thread_time() - began
    assert not router.has_work
    return adds, in_all / len(requests)


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    texts = prompts(args.requests, args.prompt, seed=1)
    names: tuple[RouterName, ...] = get_args(RouterName)
    adds: dict[str, list[float]] = {name: [] for name in names}
    totals: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            some, total = measure(name, args.workers, texts)
            adds[name] += some
            totals[name].append(total)
    told = {}
    print(f"{args.workers} workers, prompts of {args.prompt} tokens, a request on one core:")
    for name in names:
        cuts = statistics.quantiles(adds[name], n=100)
        in_all = statistics.median(totals[name])
        told[name] = {
            "add_ms_median": round(1e3 * cuts[49], 4),
            "add_ms_p99": round(1e3 * cuts[98], 4),
            "in_all_ms": round(1e3 * in_all, 4),
            "requests_per_s": round(1 / in_all),
        }
        print(
            f"  {name:16} add {1e3 * cuts[49]:.3f} ms (p99 {1e3 * cuts[98]:.3f}), in all "
            f"{1e3 * in_all:.3f} ms: {1 / in_all:,.0f} requests/s"
        )
    return told


def scale(args: argparse.Namespace) -> dict[str, Any]:
    told: dict[str, Any] = {"workers": SCALE_WORKERS}
    texts = prompts(min(args.requests, 200), args.prompt, seed=2)
    for name in get_args(RouterName):
        adds, _ = measure(name, SCALE_WORKERS, texts)
        told[f"add_ms_{name}"] = round(1e3 * statistics.median(adds), 3)
    told |= index_at_scale() | events_at_scale(args.prompt)
    cores = {
        "cores_to_choose_by_predicted": told["add_ms_predicted"] * RATE / 1e3,
        "cores_to_choose_by_round_robin": told["add_ms_round-robin"] * RATE / 1e3,
        "cores_to_read_events": told["events_us_per_request"] * RATE / 1e6,
    }
    told |= {key: round(value, 1) for key, value in cores.items()}
    told["events_MB_per_s"] = round(told["events_bytes_per_request"] * RATE / 1e6, 1)
    for key, value in told.items():
        print(f"  {key:32} {value:,}")
    return told


def index_at_scale() -> dict[str, Any]:
    """A tenth of each worker's blocks is the same everywhere."""
    source = random.Random(3)
    everywhere = [source.randbytes(32) for _ in range(SCALE_BLOCKS // 10)]
    own = [
        [source.randbytes(32) for _ in range(SCALE_BLOCKS - len(everywhere))]
        for _ in range(SCALE_WORKERS)
    ]
    index = PrefixIndex()
    tracemalloc.start()
    for number in range(SCALE_WORKERS):
        index.stored(f"w{number}", everywhere)
        index.stored(f"w{number}", own[number])
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    looked, shared = [], []
    for number in range(1000):
        before = perf_counter()
        index.cached(own[number][:31])
        looked.append(perf_counter() - before)
        if number < 100:
            before = perf_counter()
            index.cached([*everywhere, *own[number][:1]])
            shared.append(perf_counter() - before)
    return {
        "index_blocks": len(index),
        "index_bytes_per_block_beside_its_hash": round(num_bytes / len(index), 1),
        "index_us_per_look_up_of_31_blocks": round(1e6 * statistics.median(looked), 1),
        "index_us_per_look_up_that_all_have": round(1e6 * statistics.median(shared), 1),
    }


def events_at_scale(prompt: int) -> dict[str, Any]:
    """A request's blocks as an event: its bytes, and what it takes to read and index it."""
    source, size = random.Random(4), CONFIG.block_size
    index, count = PrefixIndex(), prompt // size
    payloads, writer = [], EventWriter()
    for _ in range(300):
        hashes = tuple([source.randbytes(32) for _ in range(count)])
        ids = tuple([source.randrange(32_000) for _ in range(count * size)])
        event = BlocksStored(hashes, None, ids, size, is_salted=False)
        payloads += writer.payloads((event,), 0.0)
    before = thread_time()
    for number, payload in enumerate(payloads):
        for event in read_events(payload).events:
            assert isinstance(event, BlocksStored)
            index.stored(f"w{number % SCALE_WORKERS}", event.hashes)
    seconds = thread_time() - before
    return {
        "events_bytes_per_request": round(statistics.mean(map(len, payloads))),
        "events_us_per_request": round(1e6 * seconds / len(payloads), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=800, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--scale", action="store_true", help="a thousand workers")
    args = parser.parse_args()
    told = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": sys.version.split()[0],
        "time": time.strftime("%Y-%m-%d"),
        "prompt_tokens": args.prompt,
        **(scale(args) if args.scale else {"workers": args.workers, **overhead(args)}),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
