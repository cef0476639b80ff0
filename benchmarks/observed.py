"""What watching costs those who are served: the event loop's share of the routes that tell.

Fills the history to its limits (4096 steps of 32 requests, 1024 requests that have ended, 32 of
them the choices of one reply), asks each route in turn and prints, for each: how long the reply
takes, how much of it is the event loop's own work, and the longest that the loop was kept from a
timer beside it (which also has to share the interpreter with the thread that works).

    python benchmarks/observed.py [--repeats 5]

Needs no model; the price of a step is the demo model's own.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable
from itertools import pairwise
from statistics import median

import httpx2
from starlette.applications import Starlette

from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.request import FinishReason, Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape, RequestShape
from duetto.core.timings import RequestTimings
from duetto.engine.engine import Engine
from duetto.engine.thread import in_thread
from duetto.scheduler.scheduler import Scheduler
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

NUM_STEPS, NUM_CHOICES, NUM_ENDED = 4096, 32, 1024
OWN = "f" * 32
PROMPT = 64
PATHS = (
    f"/v1/requests/{OWN}/timeline",
    "/v1/requests",
    "/debug/steps.json",
    "/metrics",
    "/version",
)
CONFIG = SchedulerConfig(num_blocks=256, max_model_len=8192, block_size=16)


class NoExecutor:
    def submit(self, batch):
        raise NotImplementedError


class NoCodec:
    vocab_size, max_token_bytes = 256, None


def price(shape: BatchShape) -> float:
    """As much work as pricing the demo model's program: a pass over the batch for each layer."""
    return sum(sum(r.num_new * r.num_past for r in shape.requests) for _ in range(8)) * 1e-9 + 1e-3


def make_app() -> Starlette:
    return create_app(
        open_engine=in_thread(Engine(Scheduler(CONFIG)), NoExecutor()),
        codec=NoCodec(),
        config=CONFIG,
        settings=ServerSettings(served_model_name="observed"),
        roof_time=price,
    )


def fill(history) -> None:
    """The last 32 requests are one reply's choices, and are in each of the steps."""
    ids = [f"{OWN}-0-{index}" for index in range(NUM_CHOICES)]
    for number in range(NUM_STEPS):
        new = PROMPT if number == 0 else 1
        rows = tuple(RequestShape(new, 0 if number == 0 else PROMPT + number - 1) for _ in ids)
        total = new * len(ids)
        record = StepRecord(
            start_time=float(number),
            end_time=number + 0.9,
            num_tokens=total,
            num_prompt_tokens=total if number == 0 else 0,
            num_scheduled=len(ids),
            num_running=len(ids),
            num_waiting=0,
            num_free_blocks=100,
            num_blocks=256,
            num_preemptions=0,
            num_queried_tokens=0,
            num_hit_tokens=0,
            shape=BatchShape(rows),
            request_ids=tuple(ids),
            predicted_s=0.9,
        )
        history.record_step(record)
    for number in range(NUM_ENDED - NUM_CHOICES):
        end(history, f"{number:032x}-0", [number + 0.5])
    times = [number + 0.9 for number in range(NUM_STEPS)]
    for request_id in ids:
        end(history, request_id, times)


def end(history, request_id: str, times: list[float]) -> None:
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(range(PROMPT)),
        sampling=SamplingParams(),
        max_tokens=8000,
        arrival_time=0.0,
        seed=0,
    )
    timings = RequestTimings(0.0, 0.0, times, times[-1])
    history.record_arrival(request)
    final = RequestUpdate(request_id, finish_reason=FinishReason.LENGTH, timings=timings)
    history.record_update(request, final)


async def measure(app: Starlette, path: str, repeats: int) -> tuple[float, float, float]:
    """Seconds: of a reply, of the loop's own work for it, and of the longest gap of a timer."""
    walls, works, gaps = [], [], []
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for _ in range(repeats):
            start, work = time.perf_counter(), time.thread_time()
            reply = await client.get(path)
            walls.append(time.perf_counter() - start)
            works.append(time.thread_time() - work)
            assert reply.status_code == 200, reply.text
            gaps.append(await longest_gap(client.get(path)))
    return median(walls), median(works), median(gaps)


async def longest_gap(asked: Awaitable[httpx2.Response]) -> float:
    """Between two ticks of a timer of a millisecond, while it is answered."""
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(time.perf_counter())
            await asyncio.sleep(0.001)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    await asked
    await asyncio.sleep(0.01)
    ticker.cancel()
    return max(b - a for a, b in pairwise(ticks))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    app = make_app()
    fill(app.state.relay.history)
    print(f"{'route':28} {'reply ms':>9} {'loop ms':>9} {'longest gap ms':>15}")
    for path in PATHS:
        wall, work, gap = await measure(app, path, repeats)
        shown = path.replace(OWN, "ID")
        print(f"{shown:28} {wall * 1e3:9.2f} {work * 1e3:9.2f} {gap * 1e3:15.2f}")


if __name__ == "__main__":
    asyncio.run(main())
