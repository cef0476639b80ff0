"""The simulator against this host: the same trace through the real engine, and in virtual time.

    python benchmarks/planner_host.py --model DIR --model DIR --trace azure.csv

For each model, the machine is first measured as `duetto calibrate` does; then 200 requests of the
trace are served by the wall clock at three loads, parts of what the model can do on this host, and
simulated by the same scheduler with two prices of a step:

- fitted: a sum of a dozen amounts whose prices are fitted to steps of this model, right before each
  load (what neighbours leave changes within minutes), on requests that are not of the trace;
- calibrated: what `duetto simulate --hardware host` takes, which has never seen the model.

The schedule is compared too: with the real steps' times, the simulator must give the same batches.
Lengths are scaled so that a model takes about `--seconds`. Writes a page of Markdown with a
picture; the last line of stdout is one JSON document.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from in_process import loaded_model, machine, today
from planner_page import (
    MEAN_LIMIT,
    METRICS,
    PRICES,
    TAIL_LIMIT,
    Pair,
    Row,
    StepRow,
    draw,
    medians,
    page,
)
from step_price import Price, fit_price

from duetto.build import Built
from duetto.core.batch import ScheduledBatch
from duetto.core.engine_args import EngineArgs
from duetto.core.executor import Executor, Pending
from duetto.core.request import Request
from duetto.core.shape import BatchShape, StepTime
from duetto.engine.engine import Engine
from duetto.measure.host import measure_host
from duetto.measure.metrics import Report, summarize
from duetto.measure.records import record_from_timings
from duetto.measure.traces import TraceFit
from duetto.measure.workload import Lengths
from duetto.pricing.find_hardware import calibration_file, write_hardware
from duetto.progress import show_progress
from duetto.scheduler.scheduler import Scheduler
from duetto.simulation.executor import SimulatedExecutor, by_shape, replayed
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import Fleet, simulate
from duetto.simulation.virtual_clock import VirtualClock
from duetto.simulation.workload import Traffic, read_trace, synthetic, timed

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "planner.md"
LOADS = (0.3, 0.6, 0.85)  # of the model's own rate when all requests are there at once
LONGEST = (4096, 512)  # prompt and answer of a trace, before they are scaled
SCALES = (1 / 64, 1 / 4)
NUM_PROBES = 40  # requests whose time says how long the others will take
LEVELS = (1, 2, 3, 4, 6, 8, 12, 16)  # requests at a time, to measure steps of all sizes
PAUSE_S = 0.03  # between requests at level 1: steps after a pause are slower


@dataclass(slots=True)
class Seen:
    """What one run of the loop left. Seconds after its start."""

    polls: list[float]  # each time the loop came round and had work
    seconds: list[float]  # that each step took, with all that the loop does beside it
    shapes: list[BatchShape]
    batches: list[list[tuple[str, int, int]]]  # per step: request, tokens before, tokens
    report: Report


class Watched:
    """An executor whose batches are remembered."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.batches: list[ScheduledBatch] = []

    def submit(self, batch: ScheduledBatch) -> Pending:
        self.batches.append(batch)
        return self._executor.submit(batch)


def serve(built: Built, load: Traffic) -> Seen:
    """Serve a load by the wall clock. Requests arrive between steps, as they do in the server."""
    executor = Watched(built.model.runner)
    start = time.monotonic()
    engine = Engine(
        Scheduler(built.scheduler_config), executor, clock=lambda: time.monotonic() - start
    )
    requests = [real_request(built, load, index) for index in range(len(load.arrivals))]
    polls: list[float] = []
    seconds: list[float] = []
    arrived = 0
    start = time.monotonic()
    while arrived < len(requests) or engine.has_work:
        now = time.monotonic() - start
        while arrived < len(requests) and requests[arrived].arrival_time <= now:
            engine.add(requests[arrived])
            arrived += 1
        if engine.has_work:
            polls.append(now)
            engine.step()
            seconds.append(time.monotonic() - start - now)
        else:  # the wait is no part of a step
            time.sleep(max(0.0, requests[arrived].arrival_time - now))
    return Seen(
        polls,
        seconds,
        [batch.shape for batch in executor.batches],
        [plain(batch) for batch in executor.batches],
        report_of(requests, time.monotonic() - start),
    )


def real_request(built: Built, load: Traffic, index: int) -> Request:
    """As the load has it, with token ids that the model knows."""
    request = load.request(index)
    vocabulary = built.codec.vocab_size
    prompt = tuple(token % vocabulary for token in request.prompt_token_ids)
    return replace(request, prompt_token_ids=prompt)


def plain(batch: ScheduledBatch) -> list[tuple[str, int, int]]:
    return [(r.request_id, r.num_computed_tokens, len(r.token_ids)) for r in batch.requests]


def report_of(requests: Sequence[Request], duration_s: float) -> Report:
    records = [
        record_from_timings(
            r.timings,
            num_prompt_tokens=r.num_prompt_tokens,
            num_cached_tokens=r.num_cached_tokens,
            finish_reason="length",
        )
        for r in requests
    ]
    return summarize(records, duration_s)


def fitted_price(built: Built, load: Traffic) -> Price:
    """The price of steps, from requests of which so many run at a time, and the next begins when
    one ends: no time is lost with waiting, and steps of all sizes are seen."""
    shapes: list[BatchShape] = []
    seconds: list[float] = []
    for level in LEVELS:
        executor = Watched(built.model.runner)
        engine = Engine(Scheduler(built.scheduler_config), executor)
        waiting = [real_request(built, load, i) for i in range(min(8 + level, len(load.arrivals)))]
        while waiting or engine.has_work:
            while waiting and len(engine.scheduler.running) + len(engine.scheduler.waiting) < level:
                engine.add(waiting.pop())
                time.sleep(PAUSE_S if level == 1 else 0.0)
            start = time.monotonic()
            engine.step()
            seconds.append(time.monotonic() - start)
        shapes += [batch.shape for batch in executor.batches]
    return fit_price(shapes, seconds)


def compare(
    built: Built, load: Traffic, prices: dict[str, StepTime], part: float, scale: float
) -> tuple[Row, Seen]:
    seen = serve(built, load)
    said = {
        name: sum_up(simulate(load, Fleet(replica=_replica(built, price))), 1).report
        for name, price in prices.items()
    }

    def both(value: Callable[[Any], float | None]) -> dict[str, dict[str, Pair]]:
        return {
            price: {
                name: (
                    1000 * (value(getattr(seen.report, name)) or 0.0),
                    1000 * (value(getattr(report, name)) or 0.0),
                )
                for name in METRICS
            }
            for price, report in said.items()
        }

    row = Row(
        model=built.name,
        load=part,
        requests_per_s=load.requests_per_s,
        length_scale=scale,
        same_batches=replay(built, load, seen.polls) == seen.batches,
        num_steps=len(seen.polls),
        mean=both(lambda d: d.mean),
        p99=both(lambda d: d.percentiles[99.0]),
    )
    return row, seen


def _replica(built: Built, price: StepTime) -> ReplicaSpec:
    return ReplicaSpec(scheduler=built.scheduler_config, step_time=price)


def replay(built: Built, load: Traffic, polls: Sequence[float]) -> list[Any]:
    """The batches of a SimulatedExecutor whose steps last as long as the real ones."""
    clock = VirtualClock(polls[0])
    durations = [b - a for a, b in pairwise(polls)]
    executor = Watched(SimulatedExecutor(by_shape(replayed((*durations, 0.0))), clock))
    engine = Engine(Scheduler(built.scheduler_config), executor, clock=clock)
    arrived = 0
    for now in polls:
        while arrived < len(load.arrivals) and load.arrivals[arrived].arrival_s <= now:
            engine.add(real_request(built, load, arrived))
            arrived += 1
        engine.step()
    return [plain(batch) for batch in executor.batches]


def step_rows(name: str, runs: Sequence[tuple[Seen, dict[str, StepTime]]]) -> Iterator[StepRow]:
    """Step by step, by what a step does: where a price is wrong, this says for which steps."""
    kinds: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for run, prices in runs:
        for shape, seconds in zip(run.shapes, run.seconds, strict=True):
            ratios = {price: price_of(shape) / seconds for price, price_of in prices.items()}
            kinds.setdefault(_kind(shape), []).append((seconds, ratios))
    for kind, steps in sorted(kinds.items()):
        medians_of = {
            price: statistics.median(ratios[price] for _, ratios in steps) for price in steps[0][1]
        }
        measured = 1000 * statistics.median(seconds for seconds, _ in steps)
        yield StepRow(name, kind, len(steps), measured, medians_of)


def _kind(shape: BatchShape) -> str:
    tokens, count = shape.num_tokens, len(shape.requests)
    if tokens == count:
        low = 1 << (count - 1).bit_length() >> 1
        return f"next tokens of {count if count < 3 else f'{low + 1} to {2 * low}'}"
    return f"with prompts, {'at most' if tokens <= 64 else 'more than'} 64 tokens"


def measure(options: argparse.Namespace) -> tuple[list[Row], list[StepRow]]:
    rows: list[Row] = []
    steps: list[StepRow] = []
    models = options.model or [None]
    args = EngineArgs(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.budget,
        backend=options.backend,
        target_itl="off",
    )
    with show_progress("runs", total=len(models) * (len(options.loads) + 3)) as bar:
        for path in models:
            with TemporaryDirectory() as folder:
                spec = measure_host(options.backend, folder=Path(folder))
            write_hardware(spec, calibration_file())
            bar.advance()
            with loaded_model(path, args) as built:
                scale, trace = trace_for(built, options)
                bar.advance()
                most = len(trace.arrivals) / burst_s(built, trace)
                bar.advance()
                runs: list[tuple[Seen, dict[str, StepTime]]] = []
                for part in options.loads:
                    load = synthetic_load(options.calibration, scale, seed=1234)
                    prices: dict[str, StepTime] = {
                        "fitted": fitted_price(built, load),
                        "calibrated": built.prices.step_time,
                    }
                    num_requests = len(trace.arrivals)
                    times = timed(num_requests, part * most, burstiness=1.0, seed=options.seed)
                    row, seen = compare(built, trace.at(times), prices, part, scale)
                    rows.append(row)
                    runs.append((seen, prices))
                    bar.advance()
                steps += step_rows(built.name, runs)
    return rows, steps


def burst_s(built: Built, load: Traffic) -> float:
    """Seconds for a load whose requests are all there at once."""
    return serve(built, load.at([0.0] * len(load.arrivals))).report.duration_s


def trace_for(built: Built, options: argparse.Namespace) -> tuple[float, Traffic]:
    """The trace, with lengths for which all runs together take about `--seconds`."""
    scale = SCALES[0]
    trace = the_trace(options, scale)
    burst_s(built, trace.first(4))  # caches, page faults
    probes = trace.first(NUM_PROBES)
    whole = burst_s(built, probes) * len(trace.arrivals) / len(probes.arrivals)
    expected = whole * (1 + sum(1 / part for part in options.loads))
    longest = built.scheduler_config.max_model_len / sum(LONGEST)
    found = min(max(scale, scale * options.seconds / expected), SCALES[1], longest)
    return found, the_trace(options, found)


def the_trace(options: argparse.Namespace, scale: float) -> Traffic:
    """Lengths of the trace, made to fit a small model on a small host."""
    if options.trace is None:
        return synthetic_load(options.num_requests, scale, seed=options.seed)
    longest = (max(1, round(scale * length)) for length in LONGEST)
    return read_trace(
        options.trace, num_requests=options.num_requests, fit=TraceFit(scale, *longest)
    )


def synthetic_load(num_requests: int, scale: float, *, seed: int) -> Traffic:
    """Lengths like those of conversations, scaled: as long on average as Azure's, and as spread."""
    most_input, most_output = (max(2, round(scale * length)) for length in LONGEST)
    return synthetic(
        num_requests,
        1.0,
        input_lengths=Lengths(max(1, most_input // 4), "lognormal", 0.8, most_input),
        output_lengths=Lengths(max(1, most_output // 2), "lognormal", 0.8, most_output),
        seed=seed,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, action="append", help="may be given again")
    parser.add_argument("--trace", type=Path, help="Azure's CSV or Mooncake's JSON lines")
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--seconds", type=float, default=240.0, help="for all loads of a model")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--budget", type=int, default=128, help="tokens a step")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--calibration", type=int, default=24, help="requests to measure steps on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args()


def main() -> None:
    options, where = parse_options(), machine()
    with TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # the user's own calibration stays as it is
        rows, steps = measure(options)
    picture = options.output.with_name(f"{options.output.stem}-host.svg")
    draw(rows, picture)
    options.output.write_text(page(rows, steps, f"Machine: {where}.", picture.name))
    errors = {
        price: {which: medians(rows, price, which) for which in ("mean", "p99")} for price in PRICES
    }
    document = {
        "benchmark": "planner_host",
        "date": today(),
        "machine": where,
        "errors": errors,
        "same_batches": all(row.same_batches for row in rows),
        "limits": {"mean": MEAN_LIMIT, "p99": TAIL_LIMIT},
        "rows": [asdict(row) for row in rows],
        "steps": [asdict(each) for each in steps],
    }
    print(f"wrote {options.output.name}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
