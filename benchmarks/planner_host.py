"""The simulator against this host: the same trace through the real engine, and in virtual time.

    python benchmarks/planner_host.py --model DIR --model DIR --trace azure.csv

For each model: the time of a step is measured on requests that are not of the trace, and a price of
six terms is fitted to it (one step, tokens, logit rows, query-key pairs, KV tokens read, requests).
Then 200 requests of the trace are served by the wall clock at three loads, parts of what the model
can do on this host; and simulated, by the same scheduler, with the fitted price. The schedule is
compared too: with the real steps' times, the simulator must give the same batches. Writes a page
of Markdown with a picture; the last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from in_process import loaded_model, machine, markdown_table, today
from numpy.typing import NDArray

from duetto.bench.metrics import Report, summarize
from duetto.bench.records import record_from_timings
from duetto.bench.traces import Fit
from duetto.bench.workload import Lengths
from duetto.build import Built, EngineArgs
from duetto.core.batch import ScheduledBatch, StepOutput
from duetto.core.request import Request
from duetto.core.shape import BatchShape
from duetto.engine.engine import Engine, Executor
from duetto.planner.replica import ReplicaSpec
from duetto.planner.report import sum_up
from duetto.planner.simulated import SimulatedExecutor, StepTime, replayed
from duetto.planner.simulation import Fleet, simulate
from duetto.planner.virtual_clock import VirtualClock
from duetto.planner.workload import Workload, read_trace, synthetic, timed
from duetto.progress import show_progress
from duetto.scheduler.scheduler import Scheduler

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "planner.md"
LOADS = (0.4, 0.7, 0.9)  # of the model's own rate when all requests are there at once
METRICS = ("ttft", "itl", "e2e")
TERMS = ("step", "token", "logit row", "pair", "KV token", "request")
MEAN_LIMIT, TAIL_LIMIT = 0.10, 0.20  # median absolute error of means, and of p99s


@dataclass(slots=True)
class Seen:
    """What one run of the loop left."""

    polls: list[float]  # seconds after the start, each time the loop came round and had work
    shapes: list[BatchShape]
    batches: list[list[tuple[str, int, int]]]  # per step: request, tokens before, tokens
    report: Report


class Watched:
    """An executor whose batches are remembered."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.batches: list[ScheduledBatch] = []

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        self.batches.append(batch)
        return self._executor.execute(batch)


def serve(built: Built, load: Workload) -> Seen:
    """Serve a load by the wall clock. Requests arrive between steps, as they do in the server."""
    executor = Watched(built.model.runner)
    start = time.monotonic()
    engine = Engine(
        Scheduler(built.scheduler_config), executor, clock=lambda: time.monotonic() - start
    )
    requests = [real_request(built, load, index) for index in range(len(load.arrivals))]
    polls: list[float] = []
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
        else:
            time.sleep(max(0.0, requests[arrived].arrival_time - now))
    return Seen(
        polls,
        [batch.shape for batch in executor.batches],
        [plain(batch) for batch in executor.batches],
        report_of(requests, time.monotonic() - start),
    )


def real_request(built: Built, load: Workload, index: int) -> Request:
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


# --- the price of a step -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds of a step as a sum of amounts, each times a price that is not negative."""

    terms: tuple[float, ...]

    def __call__(self, shape: BatchShape) -> float:
        return sum(a * b for a, b in zip(self.terms, amounts(shape), strict=True))


def amounts(shape: BatchShape) -> tuple[float, ...]:
    requests = shape.requests
    return (
        1.0,
        sum(r.num_new for r in requests),
        sum(r.num_logit_rows for r in requests),
        sum(r.attended_pairs(None) for r in requests),
        sum(r.read_tokens(None) for r in requests),
        len(requests),
    )


def fit_price(shapes: Sequence[BatchShape], seconds: Sequence[float]) -> Price:
    """Non-negative least squares (Lawson and Hanson, 1974, ch. 23) of errors relative to the price:
    relative to what was measured, it would be too low, as slow steps would count less. A step that
    took more than five times its price was made long by something else, and is left out."""
    rows, times = np.array([amounts(shape) for shape in shapes]), np.array(seconds)
    prices = times
    for _ in range(5):
        usual = times <= 5 * prices
        scaled = rows[usual] / prices[usual, None]
        terms = non_negative(scaled, times[usual] / prices[usual])
        prices = rows @ terms
    return Price(tuple(terms.tolist()))


def non_negative(rows: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x of 0 or more that brings rows @ x nearest to `right`, by coordinate descent."""
    largest = rows.max(axis=0)
    unit = rows / largest
    matrix, product = unit.T @ unit, unit.T @ right
    found = np.zeros(unit.shape[1])
    for _ in range(5_000):
        for i in range(len(found)):
            rest = product[i] - matrix[i] @ found + matrix[i, i] * found[i]
            found[i] = max(0.0, rest / matrix[i, i])
    return found / largest


def calibrate(built: Built, num_requests: int, most_prompt: int) -> Price:
    """The price of steps.

    On synthetic requests: alone, few, and many at a time, with short and long prompts.
    """
    shapes: list[BatchShape] = []
    seconds: list[float] = []
    for rate, mean in ((4.0, most_prompt), (float("inf"), most_prompt // 4), (20.0, 16)):
        load = synthetic(
            num_requests,
            rate,
            input_lengths=Lengths(mean, "lognormal", 0.8, most_prompt),
            output_lengths=Lengths(24, "lognormal", 0.8, 100),
            seed=1234,
        )
        seen = serve(built, load)
        gaps = [b - a for a, b in pairwise(seen.polls)]
        # What lies between two steps while nobody is there is no part of a step.
        busiest = statistics.median(gaps) * 50
        for shape, gap in zip(seen.shapes, gaps, strict=False):
            if gap < busiest:
                shapes.append(shape)
                seconds.append(gap)
    return fit_price(shapes, seconds)


# --- the comparison ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one load. Latencies in milliseconds: (measured, predicted)."""

    model: str
    load: float
    requests_per_s: float
    same_batches: bool  # with the real steps' times
    num_steps: int
    mean: dict[str, tuple[float, float]]
    p99: dict[str, tuple[float, float]]

    def errors(self, which: str) -> dict[str, float]:
        values: dict[str, tuple[float, float]] = getattr(self, which)
        return {name: abs(said / real - 1) for name, (real, said) in values.items()}


def compare(built: Built, load: Workload, price: StepTime, part: float) -> Row:
    seen = serve(built, load)
    spec = ReplicaSpec(scheduler=built.scheduler_config, step_time=price)
    predicted = sum_up(simulate(load, Fleet(replica=spec)), 1).report

    def both(value: Any) -> dict[str, tuple[float, float]]:
        reports = (seen.report, predicted)
        return {
            name: tuple(1000 * value(getattr(report, name)) for report in reports)
            for name in METRICS
        }

    return Row(
        model=built.name,
        load=part,
        requests_per_s=load.requests_per_s,
        same_batches=replay(built, load, seen.polls) == seen.batches,
        num_steps=len(seen.polls),
        mean=both(lambda d: d.mean or 0.0),
        p99=both(lambda d: d.percentiles[99.0] or 0.0),
    )


def replay(built: Built, load: Workload, polls: Sequence[float]) -> list[Any]:
    """The batches of a SimulatedExecutor whose steps last as long as the real ones."""
    clock = VirtualClock(polls[0])
    durations = [b - a for a, b in pairwise(polls)]
    executor = Watched(SimulatedExecutor(replayed((*durations, 0.0)), clock))
    engine = Engine(Scheduler(built.scheduler_config), executor, clock=clock)
    arrived = 0
    for now in polls:
        while arrived < len(load.arrivals) and load.arrivals[arrived].arrival_s <= now:
            engine.add(real_request(built, load, arrived))
            arrived += 1
        engine.step()
    return [plain(batch) for batch in executor.batches]


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Price]]:
    rows: list[Row] = []
    prices: dict[str, Price] = {}
    models = options.model or [None]
    args = EngineArgs(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.budget,
        backend=options.backend,
    )
    with show_progress("runs", total=len(models) * (len(options.loads) + 2)) as bar:
        for path in models:
            with loaded_model(path, args) as built:
                trace = the_trace(options)
                price = calibrate(built, options.calibration, options.max_input_len)
                prices[built.name] = price
                bar.advance()
                all_at_once = trace.at([0.0] * len(trace.arrivals))
                most = len(trace.arrivals) / serve(built, all_at_once).report.duration_s
                bar.advance()
                for part in options.loads:
                    num_requests = len(trace.arrivals)
                    times = timed(num_requests, part * most, burstiness=1.0, seed=options.seed)
                    rows.append(compare(built, trace.at(times), price, part))
                    bar.advance()
    return rows, prices


def the_trace(options: argparse.Namespace) -> Workload:
    """Lengths of the trace, made to fit a small model on a small host."""
    if options.trace is None:
        return synthetic(
            options.num_requests,
            1.0,
            input_lengths=Lengths(128, "lognormal", 0.8, options.max_input_len),
            output_lengths=Lengths(32, "lognormal", 0.8, options.max_output_len),
            seed=options.seed,
        )
    fit = Fit(options.length_scale, options.max_input_len, options.max_output_len)
    return read_trace(options.trace, num_requests=options.num_requests, fit=fit)


# --- the page ----------------------------------------------------------------------------------


def medians(rows: Sequence[Row], which: str) -> dict[str, float]:
    return {name: statistics.median(row.errors(which)[name] for row in rows) for name in METRICS}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Predicted over measured, for means and p99s; within the band is within the limit."""
    matplotlib.use("Agg")
    plt = __import__("matplotlib.pyplot", fromlist=["pyplot"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
    for panel, which, limit in zip(axes, ("mean", "p99"), (MEAN_LIMIT, TAIL_LIMIT), strict=True):
        points = [v for row in rows for v in getattr(row, which).values()]
        ends = np.array([min(min(v) for v in points) * 0.7, max(max(v) for v in points) * 1.4])
        panel.fill_between(ends, ends * (1 - limit), ends * (1 + limit), alpha=0.2, color="grey")
        panel.plot(ends, ends, color="grey", lw=0.8)
        for marker, name in zip("os^", METRICS, strict=True):
            for colour, model in enumerate(dict.fromkeys(row.model for row in rows)):
                own = [getattr(row, which)[name] for row in rows if row.model == model]
                label = f"{name.upper()}, {model}"
                panel.plot(*zip(*own, strict=True), marker, color=f"C{colour}", label=label)
        panel.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
        panel.set_title(f"{which}; band: {limit:.0%}")
    axes[0].legend(fontsize=7)
    plt.rcParams["svg.hashsalt"] = "duetto"
    figure.savefig(file, metadata={"Date": None})


def page(rows: Sequence[Row], prices: dict[str, Price], about: str, picture: str) -> str:
    def cells(row: Row, which: str) -> list[str]:
        return [f"{real:.1f} / {said:.1f}" for real, said in getattr(row, which).values()]

    compared = [
        [
            f"{row.model}, {row.load:.0%} load",
            f"{row.requests_per_s:.2f}",
            *cells(row, "mean"),
            *cells(row, "p99"),
            f"{'same' if row.same_batches else 'DIFFERENT'} ({row.num_steps})",
        ]
        for row in rows
    ]
    heads = [f"{name.upper()} {which}" for which in ("mean", "p99") for name in METRICS]
    limits = {"mean": MEAN_LIMIT, "p99": TAIL_LIMIT}
    errors = [
        [which, *(f"{value:.1%}" for value in medians(rows, which).values()), f"{limit:.0%}"]
        for which, limit in limits.items()
    ]
    terms = [
        [name, *(f"{1e6 * value:.3f}" for value in price.terms)] for name, price in prices.items()
    ]
    return f"""# The simulator, against this host

Written by `benchmarks/planner_host.py` on {today()}; do not edit.
{about}

Measured / predicted, in milliseconds. The load is a part of the rate at which the model answers the
requests when all are there at once. *Batches*: whether the simulator, with the real steps' times,
gave the real schedule, batch by batch (steps).

{markdown_table(["", "requests/s", *heads, "batches"], compared)}

![Predicted over measured]({picture})

Median absolute error over models and loads:

{markdown_table(["", *(name.upper() for name in METRICS), "limit"], errors)}

The fitted prices, in microseconds; measured on synthetic requests before the trace was served:

{markdown_table(["", *TERMS], terms)}

How to read it. ITL follows from the price of a step. TTFT is a queue's: near saturation it
multiplies whatever a step is mispriced by, so look at the highest load. What the price cannot know
is what else the machine does: a long gap that another process caused is in the measured p99 only.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", help="may be given again")
    parser.add_argument("--trace", type=Path, help="Azure's CSV or Mooncake's JSON lines")
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--length-scale", type=float, default=0.125)
    parser.add_argument("--max-input-len", type=int, default=512)
    parser.add_argument("--max-output-len", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--budget", type=int, default=128, help="tokens a step")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--calibration", type=int, default=60, help="requests, three times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    about = f"Machine: {machine()}."
    rows, prices = measure(options)
    picture = options.output.with_name(f"{options.output.stem}-host.svg")
    draw(rows, picture)
    options.output.write_text(page(rows, prices, about, picture.name))
    found = {which: medians(rows, which) for which in ("mean", "p99")}
    print(json.dumps({"errors": found, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
