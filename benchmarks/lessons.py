"""What simulation teaches about serving: four lessons, as a page with pictures.

    python benchmarks/lessons.py

Everything is simulated: the real scheduler, and prices of steps for hardware that is not here. So
the page holds no measurement, needs no GPU, and comes out the same on every machine. Writes
docs/benchmarks/lessons.md and its pictures; the last line of stdout is one JSON document.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from math import inf
from multiprocessing import get_context
from pathlib import Path
from textwrap import wrap

from lessons_pictures import draw, draw_splits

from duetto.measure.metrics import SLO
from duetto.measure.workload import Lengths
from duetto.models.find import find_program
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout
from duetto.pricing.find_hardware import find_hardware
from duetto.program.kv_size import bytes_per_block
from duetto.simulation.report import Summary, sum_up
from duetto.simulation.simulation import simulate
from duetto.simulation.workload import Traffic, synthetic

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "lessons.md"
MODEL, HARDWARE = "llama-3.1-8b", "a100-80g"
SEED = 1
LIMITS = SLO(ttft=1.0, tpot=0.03)
Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of lognormal lengths at a rate; inf is all at once."""

    rate: float
    prompt: int
    answer: int
    num_requests: int
    spread: float = 0.5

    def workload(self) -> Traffic:
        return synthetic(
            self.num_requests,
            self.rate,
            input_lengths=Lengths(self.prompt, "lognormal", self.spread),
            output_lengths=Lengths(self.answer, "lognormal", self.spread),
            seed=SEED,
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One simulation: its place in a picture, and what is simulated."""

    line: str
    x: float
    layout: Layout
    load: Load


# Lessons are about one thing at a time: no cap on a step's time, and more places than are needed.
PLAIN = Layout(max_num_seqs=256, max_num_batched_tokens=2048, target_itl="off")


def simulated(point: Point) -> Numbers:
    fleet = make_fleet(find_program(MODEL), find_hardware(HARDWARE), point.layout)
    workload = point.load.workload()
    outcome = sum_up(simulate(workload, fleet), fleet.num_devices, slo=LIMITS)
    return numbers(outcome, workload.arrivals[-1].arrival_s)


def numbers(outcome: Summary, last_arrival_s: float) -> Numbers:
    """Milliseconds, and per device. `offered` are the output tokens of the requests by the time in
    which they arrive; the throughput counts until the last answer has ended, `drain_s` later."""
    report = outcome.report
    num_devices = outcome.num_devices
    offered = report.num_output_tokens / num_devices / (last_arrival_s or inf)  # 0: all at once

    def ms(value: float | None) -> float:
        return 1000 * (value or 0.0)

    return {
        "ttft_p50": ms(report.ttft.median),
        "ttft_p99": ms(report.ttft.percentiles[99.0]),
        "itl_p50": ms(report.itl.median),
        "itl_p99": ms(report.itl.percentiles[99.0]),
        "tpot_p50": ms(report.tpot.median),
        "e2e_p50": ms(report.e2e.median),
        "throughput": report.per_second(report.num_output_tokens) / num_devices,
        "offered": offered,
        "drain_s": report.duration_s - last_arrival_s,
        "attainment": (report.num_good or 0) / report.num_requests,
        "transfer": ms(float(outcome.transfer.mean()) if len(outcome.transfer) else 0.0),
    }


# --- the four lessons --------------------------------------------------------------------------


def chunk_sizes(seconds: float) -> list[Point]:
    """Budgets of a step, and whole prompts, at two rates."""
    points = []
    for rate in (1.0, 4.0):
        load = Load(rate, 2000, 200, count(rate, seconds))
        for budget in (128, 256, 512, 1024, 2048, 4096, 8192):
            layout = replace(PLAIN, max_num_batched_tokens=budget)
            points.append(Point(f"{rate:g} requests/s", budget, layout, load))
    return points


def count(rate: float, seconds: float) -> int:
    """Requests in so long a time; at least enough for a percentile."""
    return max(50, round(rate * seconds))


def batch_sizes(_seconds: float) -> list[Point]:
    """Requests that run at one time, all waiting from the start."""
    points = []
    for prompt in (128, 2048):
        for size in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            load = Load(float("inf"), prompt, 128, 2 * size, 0.0)
            points.append(
                Point(f"prompts of {prompt}", size, replace(PLAIN, max_num_seqs=size), load)
            )
    return points


def batchings(seconds: float) -> list[Point]:
    """Static and continuous at rising rates."""
    points = []
    for policy in ("static", "fcfs"):
        layout = replace(
            PLAIN, scheduling_policy=policy, max_num_seqs=64, max_num_batched_tokens=1024
        )
        name = "static" if policy == "static" else "continuous"
        for rate in (0.25, 0.5, 1, 2, 4, 8, 12):
            load = Load(rate, 512, 200, count(rate, 4 * seconds), 0.8)
            points.append(Point(name, rate, layout, load))
    return points


SHAPES = {"long prompts": (4000, 64), "balanced": (1000, 250), "long answers": (200, 1000)}
FOUR = {
    "4 chunked (512)": replace(PLAIN, replicas=4, max_num_batched_tokens=512),
    "4 chunked (2048)": replace(PLAIN, replicas=4),
    "1 prefill + 3 decode": replace(PLAIN, replicas=3, prefill_replicas=1),
    "2 prefill + 2 decode": replace(PLAIN, replicas=2, prefill_replicas=2),
    "3 prefill + 1 decode": replace(PLAIN, replicas=1, prefill_replicas=3),
}
SLOW_NAME = "2 + 2 over 10 Gbit/s"
SLOW_LINK = replace(FOUR["2 prefill + 2 decode"], kv_bandwidth=1.25)


def splits(seconds: float) -> list[Point]:
    """Four devices, chunked and disaggregated, for three shapes of requests at rising rates."""
    points = []
    layouts = {**FOUR, SLOW_NAME: SLOW_LINK}
    rates = {
        "long prompts": (1, 2, 3, 4, 5, 6, 8, 10),
        "balanced": (4, 8, 12, 16, 20, 24, 28, 32),
        "long answers": (4, 8, 12, 16, 20, 24, 28, 32),
    }
    for shape, (prompt, answer) in SHAPES.items():
        for name, layout in layouts.items():
            for rate in rates[shape]:
                load = Load(rate, prompt, answer, count(rate, seconds))
                points.append(Point(f"{shape}: {name}", rate, layout, load))
    return points


Results = dict[str, list[tuple[float, Numbers]]]  # by line


def gathered(points: Sequence[Point], found: Sequence[Numbers]) -> Results:
    lines: Results = {}
    for point, values in zip(points, found, strict=True):
        lines.setdefault(point.line, []).append((point.x, values))
    return lines


# --- the page ----------------------------------------------------------------------------------


def rate_sustained(curve: Sequence[tuple[float, Numbers]]) -> float:
    """The highest of the rates tried, from the lowest on, with 90 % of requests within limits."""
    best = 0.0
    for rate, values in curve:
        if values["attainment"] < 0.9:
            break
        best = rate
    return best


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def curve_table(lines: Results, x_label: str, keys: dict[str, str]) -> str:
    rows = [
        [name, f"{x:g}", *(f"{values[key]:.1f}" for key in keys)]
        for name, curve in lines.items()
        for x, values in curve
    ]
    return table(["", x_label, *keys.values()], rows)


def splits_table(lines: Results) -> str:
    names = [name.split(": ")[1] for name in lines if name.startswith("balanced:")]
    rows = [
        [name, *(f"{rate_sustained(lines[f'{shape}: {name}']):g}" for shape in SHAPES)]
        for name in names
    ]
    return table(["requests/s with 90% in limits", *SHAPES], rows)


CHUNK_COLUMNS = {
    "ttft_p50": "TTFT p50",
    "itl_p50": "ITL p50",
    "itl_p99": "ITL p99",
    "e2e_p50": "E2E p50",
}
BATCH_COLUMNS = {
    "throughput": "output tok/s",
    "tpot_p50": "TPOT p50",
    "e2e_p50": "E2E p50",
}
POLICY_COLUMNS = {
    "ttft_p50": "TTFT p50",
    "ttft_p99": "TTFT p99",
    "tpot_p50": "TPOT p50",
    "offered": "offered tok/s",
    "throughput": "output tok/s",
    "drain_s": "end, s",
}


# --- sentences that depend on what was found ---------------------------------------------------


def of_streams_in_company(policies: Results) -> str:
    """At which rates the streams of continuous batching are clearly the slower ones."""
    pairs = zip(policies["static"], policies["continuous"], strict=True)
    slower = [f"{x:g}" for (x, a), (_, b) in pairs if b["tpot_p50"] > 1.1 * a["tpot_p50"]]
    where = f"at {_listed(slower)} requests/s" if slower else "at none of these rates"
    return (
        f"Its streams share steps with prompts and with more company: {where} that makes its TPOT "
        f"longer by more than a tenth."
    )


def against_four(split: Results, shape: str) -> str:
    """What the best split of a shape sustains beside the better of the equal four."""
    rates = {name: rate_sustained(split[f"{shape}: {name}"]) for name in FOUR}
    apart = max((n for n in FOUR if "chunked" not in n), key=lambda name: rates[name])
    alike = max((n for n in FOUR if "chunked" in n), key=lambda name: rates[name])
    return (
        f"With {shape} {apart} sustains {rates[apart]:g} requests/s within the limits, four equal "
        f"replicas {rates[alike]:g}."
    )


def of_the_link(split: Results) -> str:
    """What two links of prefill replicas carry, and where that is seen."""
    bytes_per_token = bytes_per_block(find_program(MODEL), 1, "bfloat16")
    num_bytes_per_s = 2e9 * (SLOW_LINK.kv_bandwidth or 0.0)
    most = [f"{num_bytes_per_s / (prompt * bytes_per_token):.1f}" for prompt, _ in SHAPES.values()]
    pairs = [(split[f"{s}: 2 prefill + 2 decode"], split[f"{s}: {SLOW_NAME}"]) for s in SHAPES]
    worse = [
        shape
        for shape, (fast, slow) in zip(SHAPES, pairs, strict=True)
        if rate_sustained(slow) < rate_sustained(fast)
    ]
    (rate, fast), (_, slow) = (curve[0] for curve in pairs[0])
    return (
        f"The first gap of every answer shows it, and the ITL's p99 where answers are short: at "
        f"{rate:g} requests/s with {next(iter(SHAPES))} {slow['itl_p99']:.0f} ms rather than "
        f"{fast['itl_p99']:.0f}. Limits on TTFT, and on a mean over all of an answer's gaps, "
        f"hardly see it until the links are full, which for the three shapes is at "
        f"{_listed(most)} requests/s. Of the rates tried, the slow link sustains fewer with "
        f"{_listed(worse) if worse else 'none of the shapes'}."
    )


def of_the_baseline(split: Results) -> str:
    """How much longer the tails of chunked replicas are than a split's, where all keep up."""
    names = ("2 prefill + 2 decode", "4 chunked (512)", "4 chunked (2048)")
    curves = [split[f"long prompts: {name}"] for name in names]
    best = min(rate_sustained(curve) for curve in curves) or curves[0][0][0]
    apart, small, large = (dict(curve)[best] for curve in curves)
    return (
        f"At {best:g} requests/s with long prompts the ITL's p99 of four equal replicas is "
        f"{small['itl_p99'] / apart['itl_p99']:.1f} times that of 2 prefill + 2 decode with chunks "
        f"of 512, and {large['itl_p99'] / apart['itl_p99']:.1f} times with chunks of 2,048."
    )


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def command(point: Point) -> str:
    """What simulates a point again: every flag that is not as `duetto simulate` has it."""
    load = point.load
    flags = {
        "hardware": HARDWARE,
        "num_prompts": load.num_requests,
        "request_rate": load.rate,
        "random_input_len": load.prompt,
        "random_output_len": load.answer,
        "seed": SEED,
        "slo": f"ttft={LIMITS.ttft:g}s,tpot={1000 * (LIMITS.tpot or 0):g}ms",
    }
    if load.spread:
        flags |= {"random_lengths": "lognormal", "random_range_ratio": load.spread}
    plain = Layout()
    for entry in fields(Layout):
        value = getattr(point.layout, entry.name)
        if value != getattr(plain, entry.name):
            flags[entry.name] = value
    words = (f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
    return " \\\n    ".join(
        wrap(f"duetto simulate {MODEL} {' '.join(words)}", 94, break_on_hyphens=False)
    )


def examples(seconds: float) -> dict[str, Point]:
    """A row of each lesson, in words, and what is simulated for it."""
    chosen = {
        "a chunk of 512 at 4 requests/s": (chunk_sizes, "4 requests/s", 512),
        "32 requests with prompts of 2,048": (batch_sizes, "prompts of 2048", 32),
        "a static batch at 2 requests/s": (batchings, "static", 2),
        "long prompts on 2 + 2 at 4 requests/s": (
            splits,
            "long prompts: 2 prefill + 2 decode",
            4,
        ),
    }
    return {
        words: next(p for p in lesson(seconds) if (p.line, p.x) == (line, x))
        for words, (lesson, line, x) in chosen.items()
    }


def filled(text: str, indent: str = "") -> str:
    """In lines of up to 100 columns, to stand behind an indent."""
    lines = wrap(text, 100 - len(indent), break_on_hyphens=False)
    return f"\n{indent}".join(lines)


def page(
    chunks: Results, batches: Results, policies: Results, split: Results, seconds: float
) -> str:
    again = "\n".join(f"# {words}\n{command(one)}" for words, one in examples(seconds).items())
    return f"""# Lessons, simulated

Written by `benchmarks/lessons.py`; do not edit. The real scheduler in virtual time; the prices of
steps are those of {MODEL} in bfloat16 on the {HARDWARE} of `pricing/gpus.py`, with graphs.
No number here was measured: they are about schedules, and as good as those prices
([planner-published.md](planner-published.md) has them beside others' measurements). Lengths are
lognormal, arrivals are a Poisson process; [metrics.md](../metrics.md) defines the metrics. Limits,
where there are any: TTFT {LIMITS.ttft:g} s and TPOT {1000 * (LIMITS.tpot or 0):g} ms, together.

## The size of a chunk trades TTFT for ITL

![TTFT and ITL by chunk size](lessons-chunks.svg)

{curve_table(chunks, "tokens a step", CHUNK_COLUMNS)}

Prompts of 2,000 tokens and answers of 200. A step that computes part of a prompt makes every
stream wait for it: the ITL's tail grows with the chunk, in proportion once the step is bound by
arithmetic, until a chunk holds all the prompts that wait. Small chunks read the weights, and the KV
of the chunks before, more often, and leave the arithmetic units idle: the prompt takes longer, and
at a rate near saturation the queue grows without end. So chunked prefill does not improve TTFT; it
buys steady streams with it (Sarathi-Serve, Agrawal et al., OSDI 2024).

## A larger batch shares the weights

![Throughput and latency by batch size](lessons-batch.svg)

{curve_table(batches, "requests", BATCH_COLUMNS)}

A decode step reads all weights, for one request or for many: until arithmetic or KV takes over,
another request is nearly free. With prompts of 2,048 tokens the KV that each request brings along
is read for it alone, and so are the prompts computed: there the curve bends sooner.

## Continuous batching does not wait for the longest

![Static and continuous batching by rate](lessons-batching.svg)

{curve_table(policies, "requests/s", POLICY_COLUMNS)}

At most 64 requests run. A static batch ends with its longest answer, and nobody joins it until
then: even at low rates a request waits for a batch that it is not part of. Continuous batching
(Orca, Yu et al., OSDI 2022) admits at every step.
{filled(of_streams_in_company(policies))}

Offered are the output tokens of the requests that were drawn, by the time in which they arrive. The
output per second counts until the last answer has ended, and long answers are still under way when
the last request comes: so it falls short of what is offered by that end (its seconds are in the
last column) also where the server keeps up.

## Disaggregation: where it wins, and where it loses

![Attainment and ITL by rate for three shapes of requests](lessons-splits.svg)

{splits_table(split)}

Four devices either way. A replica that only decodes has no steps with prompts: as long as there is
room on it, its ITL has hardly a tail. But the split is fixed, and the load is not:

- **It wins where prompts are long and streams must be steady.** Chunks small enough for that cost
  arithmetic, chunks that are not cost the streams: look at the ITL of the chunked replicas.
  {filled(against_four(split, "long prompts"), indent="  ")}
- **It loses where the split does not match the load.** With long answers a prefill replica idles
  while those that decode are full, each with a larger batch than four equal ones would have; with
  long prompts a single prefill replica is the bottleneck, and TTFT the price. Four equal replicas
  have no split to get wrong.
  {filled(against_four(split, "long answers"), indent="  ")}
- **A link that is slower than computing costs the first gap, then the rate.** A prompt of 4,000
  tokens has half a gigabyte of KV. Sent layer by layer while the next layers compute, all but the
  last layer is hidden, until sending takes longer than computing. At 10 Gbit/s it does, and
  transfers wait for each other too.
  {filled(of_the_link(split), indent="  ")}
- **The baseline decides.**
  {filled(of_the_baseline(split), indent="  ")}
  The 7.4x of DistServe (Zhong et al., OSDI 2024) had no baseline with Sarathi's chunks.

## Again

```sh
python benchmarks/lessons.py
{again}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--seconds", type=float, default=40, help="of load, for most points")
    options = parser.parse_args()
    lessons = [make(options.seconds) for make in (chunk_sizes, batch_sizes, batchings, splits)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        run = partial(pool.map, simulated, chunksize=1)
        found = [gathered(points, list(run(points))) for points in lessons]
    draw_all(found, options.output.parent)
    options.output.write_text(page(*found, options.seconds))
    names = ("chunks", "batches", "batchings", "splits")
    print(json.dumps(dict(zip(names, found, strict=True))))


def draw_all(found: Sequence[Results], folder: Path) -> None:
    chunks, batches, policies, split = found
    title = f"{MODEL} in bfloat16 on {HARDWARE}, simulated"
    panels = [("ttft_p50", "TTFT p50, ms"), ("itl_p99", "ITL p99, ms"), ("e2e_p50", "E2E p50, ms")]
    log = {"xscale": "log", "yscale": "log"}
    draw(chunks, panels, "tokens a step", folder / "lessons-chunks.svg", title=title, **log)
    panels = [("throughput", "output tokens/s"), ("tpot_p50", "TPOT p50, ms")]
    draw(batches, panels, "requests at one time", folder / "lessons-batch.svg", title=title, **log)
    panels = [("ttft_p50", "TTFT p50, ms"), ("tpot_p50", "TPOT p50, ms")]
    words = f"{title}, at most 64 requests at a time"
    draw(policies, panels, "requests/s", folder / "lessons-batching.svg", title=words, yscale="log")
    words = f"{MODEL} in bfloat16 on 4 {HARDWARE}, simulated"
    draw_splits(split, SHAPES, folder / "lessons-splits.svg", title=words)


if __name__ == "__main__":
    main()
