"""What it costs that an engine is in another process: frames, the way there and back, CPU.

    python benchmarks/cluster/wire.py [--json FILE]

The engine computes nothing (its executor says one letter), so that all that is measured is the
wire: a request of one token, alone and many at once, with the engine in this process and, in turns
with that, in another one over ipc, TCP and encrypted TCP.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from duetto.cluster.address import WireAddress, read_address
from duetto.cluster.doorway import Doorway
from duetto.cluster.facts import WorkerFacts
from duetto.cluster.frames import add_frame, decode_frame
from duetto.cluster.remote import RemoteEngine
from duetto.cluster.report_frames import report_frames, report_in
from duetto.cluster.secret import ClusterSecret
from duetto.cluster.wire import Wire
from duetto.cluster.worker import WorkerServer
from duetto.core.batch import (
    RequestResult,
    RequestUpdate,
    SampledToken,
    ScheduledBatch,
    StepOutput,
    StepRecord,
)
from duetto.core.config import SchedulerConfig
from duetto.core.executor import Done
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape, RequestShape
from duetto.engine.engine import Engine, StepReport
from duetto.engine.handle import EngineHandle
from duetto.engine.thread import EngineThread, in_thread
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=4096, max_model_len=4096)
SECRET = ClusterSecret(b"of this benchmark alone")
WAYS = ("ipc", "tcp", "tcp, encrypted")


class OneLetter:
    """An executor that computes nothing."""

    def submit(self, batch: ScheduledBatch) -> Done:
        results = [RequestResult((SampledToken(97),) if r.rows else ()) for r in batch.requests]
        return Done(StepOutput(tuple(results)))


def engine() -> Engine:
    return Engine(Scheduler(CONFIG), OneLetter())


def request(name: str, num_tokens: int = 100) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(max_tokens=1),
        max_tokens=1,
        seed=0,
    )


class Door:
    """A dispatcher, and who listens to an engine here."""

    def __init__(self) -> None:
        self.is_joined = threading.Event()
        self.ended = threading.Semaphore(0)
        self.worker: RemoteEngine | None = None

    def heard(self, report: StepReport) -> None:
        for update in report.updates:
            if update.finish_reason is not None:
                self.ended.release()

    def why_not(self, _facts: WorkerFacts) -> str | None:
        return None

    def joined(self, worker: RemoteEngine) -> None:
        self.worker = worker
        self.is_joined.set()

    def deliver(self, _worker: RemoteEngine, report: StepReport) -> None:
        self.heard(report)

    def leaving(self, _worker: RemoteEngine) -> None: ...

    def lost(
        self, _worker: RemoteEngine, _reason: str, unbegun: tuple[Request, ...]
    ) -> tuple[Request, ...]:
        return unbegun

    def not_taken(self, _worker: RemoteEngine, _request: Request, _reason: str) -> bool:
        return False


def run_worker(address: WireAddress, is_secret: bool, pipe: Any) -> None:
    wire = Wire(SECRET if is_secret else None)
    facts = WorkerFacts(
        version="1",
        worker_id="w",
        name="letter",
        model="m",
        numerics="n",
        kv_layout="k",
        block_bytes=1,
        scheduler=CONFIG,
    )
    server = WorkerServer(facts, in_thread(engine()), wire, vocab_size=2**20)
    server.start()
    bound = wire.bind(address, "--listen")
    server.listen(bound)
    pipe.send(str(bound.address))
    pipe.recv()
    pipe.send(time.process_time())
    server.leave(0.0)


def alone(handle: EngineHandle, door: Door, count: int) -> list[float]:
    """Seconds of requests one after the other."""
    took = []
    for number in range(count):
        start = time.perf_counter()
        handle.add(request(f"a{number}-{start}"))
        door.ended.acquire()
        took.append(time.perf_counter() - start)
    return sorted(took)


def many(handle: EngineHandle, door: Door, count: int) -> tuple[float, float]:
    """Requests per second, and CPU seconds of this process for each."""
    start, cpu = time.perf_counter(), time.process_time()
    for number in range(count):
        handle.add(request(f"m{number}-{start}"))
    for _ in range(count):
        door.ended.acquire()
    return count / (time.perf_counter() - start), (time.process_time() - cpu) / count


def over(way: str, here: EngineThread, here_door: Door, count: int) -> dict[str, float]:
    folder = tempfile.mkdtemp()
    text = f"ipc://{folder}/s" if way == "ipc" else "tcp://127.0.0.1:*"
    is_secret = way.endswith("encrypted")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    address = read_address(text, "--listen", listens=True)
    child = multiprocessing.get_context("spawn").Process(
        target=run_worker, args=(address, is_secret, theirs)
    )
    child.start()
    wire, door = Wire(SECRET if is_secret else None), Door()
    doorway = Doorway(wire, door, "1")
    wire.start()
    doorway.call(read_address(ours.recv(), "--join", listens=False))
    assert door.is_joined.wait(20) and door.worker is not None
    told: list[list[float]] = [[], []]
    for _ in range(4):  # in turns
        told[0] += alone(here, here_door, count // 4)
        told[1] += alone(door.worker, door, count // 4)
    rates = [many(door.worker, door, count) for _ in range(3)]
    trip = door.worker.round_trip.least_s
    doorway.stop()
    door.worker.stop(1.0)
    ours.send(None)
    worker_cpu = ours.recv()
    wire.stop()
    child.join(10)
    here_s, there_s = sorted(told[0]), sorted(told[1])
    return {
        "alone_here_median_us": median(here_s) * 1e6,
        "alone_there_median_us": median(there_s) * 1e6,
        "alone_there_p99_us": there_s[int(len(there_s) * 0.99)] * 1e6,
        "round_trip_least_us": trip * 1e6,
        "requests_per_s": max(rate for rate, _ in rates),
        "door_cpu_us_per_request": min(cpu for _, cpu in rates) * 1e6,
        "worker_cpu_s": worker_cpu,
    }


def timed(function: Callable[[], object], count: int = 3000) -> float:
    """Microseconds, the least of five."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count // 5):
            function()
        found.append((time.perf_counter() - start) / (count // 5))
    return min(found) * 1e6


def frames() -> dict[str, float]:
    long = request("chatcmpl-0123456789abcdef-0", 1000)
    added = add_frame(long, 0.0)
    updates = tuple(
        RequestUpdate(f"chatcmpl-{i:032x}-0", (SampledToken(1000 + i),), text=" word")
        for i in range(64)
    )
    shape = BatchShape(tuple(RequestShape(1, 500 + i) for i in range(64)))
    names = tuple(update.request_id for update in updates)
    record = StepRecord(1.0, 2.0, 64, 0, 64, 64, 0, 100, 4096, 0, 0, 0, shape, names)
    report = StepReport(updates, record)
    (told,) = report_frames(report)
    return {
        "add_1000_tokens_bytes": len(added),
        "add_1000_tokens_encode_us": timed(lambda: add_frame(long, 0.0)),
        "add_1000_tokens_decode_us": timed(lambda: decode_frame(added).request.request()),
        "report_of_64_bytes": len(told),
        "report_of_64_encode_us": timed(lambda: list(report_frames(report))),
        "report_of_64_decode_us": timed(lambda: report_in(decode_frame(told), 0.0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--requests", type=int, default=2000)
    asked = parser.parse_args()
    here_door = Door()
    here = EngineThread(engine(), here_door.heard)
    here.start()
    found = {"frames": frames()}
    found |= {way: over(way, here, here_door, asked.requests) for way in WAYS}
    here.stop(5)
    for name, values in found.items():
        print(name, *(f"  {key}: {value:.4g}" for key, value in values.items()), sep="\n")
    if asked.json:
        Path(asked.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
