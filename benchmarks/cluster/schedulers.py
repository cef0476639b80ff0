"""Schedulers under one load: measured on two cores and simulated beside, then on 8 and 64 GPUs.

    duetto bench schedulers ... --json                 # its documents are kept in
                                                       # docs/benchmarks/cluster-schedulers.json
    python benchmarks/cluster/schedulers.py            # simulates the GPUs, writes the sections
    python benchmarks/cluster/schedulers.py --again    # from what was simulated before

Writes its two sections of docs/benchmarks/cluster.md, between their marks, and the pictures; the
last line of stdout is one JSON document.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from duetto.measure.metrics import SLO
from duetto.measure.workload import Lengths
from duetto.models.find import find_program
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout
from duetto.pricing.find_hardware import find_hardware
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import simulate
from duetto.simulation.workload import synthetic

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
PAGE = FOLDER / "cluster.md"
REAL = FOLDER / "cluster-schedulers.json"
SCALE = FOLDER / "cluster-scale.json"
KEPT = 0.9  # of requests within the limits, for a rate to be sustained
SECONDS = {"long prompts": 8, "chat": 4}  # of arrivals
PLAIN = Layout(max_num_seqs=256, max_num_batched_tokens=512, target_itl="off")


@dataclass(frozen=True, slots=True)
class Scale:
    """A model on so many devices."""

    model: str
    num_devices: int
    tp: int
    slo: SLO
    rates: Mapping[str, Sequence[float]]  # by shape of requests

    @property
    def name(self) -> str:
        return f"{self.num_devices} H100, {self.model}, tp {self.tp}"

    def layouts(self) -> dict[str, Layout]:
        """All engines alike with small and large chunks, or split a quarter or half for prompts."""
        base, engines = replace(PLAIN, tp=self.tp), self.num_devices // self.tp
        split = {
            f"{part} of {engines} prefill": replace(
                base, replicas=engines - part, prefill_replicas=part, max_num_batched_tokens=2048
            )
            for part in (engines // 4, engines // 2)
        }
        return {
            "chunked 512": replace(base, replicas=engines),
            "chunked 2048": replace(base, replicas=engines, max_num_batched_tokens=2048),
            **split,
        }


SHAPES = {"long prompts": (4000, 128), "chat": (500, 100)}
SCALES = (
    Scale(
        *("llama-3.1-8b", 8, 1, SLO(ttft=0.5, tpot=0.02)),
        {"long prompts": (10, 20, 30, 40), "chat": (60, 120, 180, 240)},
    ),
    Scale(
        *("llama-3.1-70b", 64, 4, SLO(ttft=1.0, tpot=0.04)),
        {"long prompts": (10, 20, 30, 40), "chat": (100, 200, 300, 400)},
    ),
)
Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Point:
    scale: str
    shape: str
    line: str
    rate: float


def simulated(point: Point) -> Numbers:
    scale = next(s for s in SCALES if s.name == point.scale)
    prompt, answer = SHAPES[point.shape]
    fleet = make_fleet(
        find_program(scale.model), find_hardware("h100"), scale.layouts()[point.line]
    )
    load = synthetic(
        round(SECONDS[point.shape] * point.rate),
        point.rate,
        input_lengths=Lengths(prompt, "lognormal", 0.5),
        output_lengths=Lengths(answer, "lognormal", 0.5),
        seed=1,
    )
    report = sum_up(simulate(load, fleet), fleet.num_devices, slo=scale.slo).report
    return {
        "kept": (report.num_good or 0) / report.num_requests,
        "ttft_p50": 1000 * (report.ttft.median or 0.0),
        "ttft_p99": 1000 * (report.ttft.percentiles[99.0] or 0.0),
        "itl_p99": 1000 * (report.itl.percentiles[99.0] or 0.0),
        "tpot_p50": 1000 * (report.tpot.median or 0.0),
        "tpot_p99": 1000 * (report.tpot.percentiles[99.0] or 0.0),
    }


def points() -> list[Point]:
    return [
        Point(scale.name, shape, line, rate)
        for scale in SCALES
        for shape in SHAPES
        for line in scale.layouts()
        for rate in scale.rates[shape]
    ]


def simulate_all(num_processes: int) -> list[dict[str, Any]]:
    every = points()
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(simulated, every, chunksize=1))
    return [
        {"scale": p.scale, "shape": p.shape, "line": p.line, "rate": p.rate, **numbers}
        for p, numbers in zip(every, found, strict=True)
    ]


# --- the sections ------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def real_section(runs: Sequence[Mapping[str, Any]]) -> str:
    first = runs[0]
    limits = ", ".join(f"{name} {ms:g} ms" for name, ms in first["slo_ms"].items())
    tables = "\n\n".join(run_part(run) for run in runs)
    commands = "\n".join(f"    duetto bench schedulers {run['command']}" for run in runs)
    return f"""## Schedulers on two cores, measured and simulated

![Latencies by scheduler](cluster-schedulers.svg)

{first["model"]} on {first["threads"]} threads of two shared cores; lognormal lengths of
{first["input_len"]} and {first["output_len"]} tokens on average, {first["repetitions"]} runs of
each in turns; good are requests within {limits}. Where there are two engines, each has one thread.
All runs agree in every token, also those whose KV came over the link (shared memory).

Simulated is the same load through the same scheduler, with the prices that steps of these engines
had (`pricing/learned.py`, each step until the next one begins) and, for the KV link,
{first["kv_bandwidth"]:g} GB/s. The machine is not ours alone: the longest of the measured latencies
are also those of its other work, which the prices partly take for the engine's own.

{tables}

{WORDS}

{commands}
"""


WORDS = """What is seen:

- **Static batching** waits for the longest answer of a batch: its TTFT is several times all others'
  as soon as requests come faster than batches end.
- **Whole prompts** (continuous) hold up every stream for as long as a prompt takes. Chunks bound a
  step, but on so small a model a chunk of 512 tokens is a whole prompt more often than not: the two
  differ less than this machine does from run to run.
- **Disaggregated** has the steadiest streams (ITL and TPOT at p99), and the first token comes
  later: one core, not two, computes a prompt, and the last tokens of it, the first step and the
  link come on top. It wins on a limit on gaps, and loses on one on TTFT; here the TTFT is what is
  limited tightly, and at 8/s two engines that do both (2 replicas) have more good requests.
- **The simulator** puts static batching last and disaggregated TTFT before it, as measured, and
  medians of TTFT within a third. It is not within 15 %: TPOT of one engine is 0.4 times what was
  measured at 4/s and 3 times at 8/s, because its prices are what the last steps took, on a machine
  whose steps of two threads vary by as much from minute to minute. Its tails are shorter: it has
  neither this machine's pauses nor engines that slow each other down."""


def run_part(found: Mapping[str, Any]) -> str:
    rows = [
        [f"{kind}, {where}", *cells(found[where][kind])]
        for kind in found["simulated"]
        for where in ("real", "simulated")
    ]
    header = ["p50 / p99, ms", "TTFT", "ITL", "TPOT", "E2E", "tok/s", "good"]
    words = f"**{found['num_prompts']} requests at {found['request_rate']:g}/s**"
    return f"{words}\n\n{table(header, rows)}\n\n{against(found)}"


def cells(report: Mapping[str, Any]) -> list[str]:
    both = [
        f"{report[f'median_{name}_ms']:.1f} / {report[f'p99_{name}_ms']:.1f}"
        for name in ("ttft", "itl", "tpot", "e2el")
    ]
    return [*both, f"{report['output_throughput']:.0f}", f"{report['slo_attainment']:.0%}"]


def against(found: Mapping[str, Any]) -> str:
    """The disaggregated pair beside the two that have the same cores."""
    real = found["real"]
    one, apart, two = (real[k] for k in ("chunked", "disaggregated", "chunked, 2 replicas"))
    parts = [
        f"{name} {apart[key] / one[key]:.2f} and {apart[key] / two[key]:.2f}"
        for name, key in (
            ("TTFT p50", "median_ttft_ms"),
            ("ITL p99", "p99_itl_ms"),
            ("TPOT p99", "p99_tpot_ms"),
            ("E2E p50", "median_e2el_ms"),
        )
    ]
    return (
        "Disaggregated, as a multiple of one chunked engine of two threads and of two of one "
        f"thread:\n{', '.join(parts)}."
    )


def scale_section(found: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for scale in SCALES:
        own = [p for p in found if p["scale"] == scale.name]
        rows = [
            [line, *(rate_words(own, scale, shape, line) for shape in SHAPES)]
            for line in scale.layouts()
        ]
        heads = [f"{shape} ({SHAPES[shape][0]} + {SHAPES[shape][1]})" for shape in SHAPES]
        limits = ", ".join(f"{name} {ms:g} ms" for name, ms in scale.slo.as_ms().items())
        parts.append(
            f"**{scale.name}** (limits: {limits})\n\n"
            + table(["requests/s with 90% within", *heads], rows)
            + "\n\n"
            + "\n".join(f"- {words}" for words in winners(own, scale))
        )
    body, long, chat = "\n\n".join(parts), SECONDS["long prompts"], SECONDS["chat"]
    return f"""## Disaggregated against chunked on 8 and 64 GPUs, simulated

![Requests within limits, and ITL, by rate](cluster-scale.svg)

Equal devices either way. Nothing here was measured: prices of steps are those of
`pricing/gpus.py`, links are the NVLink of its H100, routers send to the least loaded, prompts share
nothing; {long} s of arrivals of long prompts and {chat} s of chat, lognormal lengths. The rates
sustained are the highest of those tried, from the lowest on; where all were, more may be.

{body}

    python benchmarks/cluster/schedulers.py
"""


def curve(own: Sequence[Mapping[str, Any]], shape: str, line: str) -> list[Mapping[str, Any]]:
    return [p for p in own if (p["shape"], p["line"]) == (shape, line)]


def sustained(own: Sequence[Mapping[str, Any]], shape: str, line: str) -> float:
    best = 0.0
    for point in curve(own, shape, line):
        if point["kept"] < KEPT:
            break
        best = point["rate"]
    return best


def rate_words(own: Sequence[Mapping[str, Any]], scale: Scale, shape: str, line: str) -> str:
    best = sustained(own, shape, line)
    return f"{best:g}" if best < max(scale.rates[shape]) else f"{best:g} or more"


def winners(own: Sequence[Mapping[str, Any]], scale: Scale) -> list[str]:
    words = []
    for shape in SHAPES:
        rates = {line: sustained(own, shape, line) for line in scale.layouts()}
        alike = max((n for n in rates if "chunked" in n), key=lambda n: rates[n])
        apart = max((n for n in rates if "prefill" in n), key=lambda n: rates[n])
        low = scale.rates[shape][0]
        tails = {
            n: next(p["itl_p99"] for p in curve(own, shape, n) if p["rate"] == low)
            for n in (alike, apart)
        }
        verdict = "chunked and apart sustain the same"
        if rates[alike] != rates[apart]:
            verdict = "apart wins" if rates[apart] > rates[alike] else "chunked wins"
        words.append(
            f"{shape}: {verdict}: {rates[alike]:g}/s {alike}, {rates[apart]:g}/s {apart};\n"
            f"  at {low:g}/s the ITL's p99 is {tails[alike]:.1f} ms and {tails[apart]:.1f} ms"
        )
    return words


# --- pictures and the page -----------------------------------------------------------------------


def draw_real(found: Mapping[str, Any], file: Path) -> None:
    kinds = list(found["simulated"])
    keys = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2el": "E2E"}
    figure, axes = plt.subplots(1, len(keys), figsize=(13, 3.4), layout="constrained", sharey=True)
    for panel, (key, label) in zip(axes, keys.items(), strict=True):
        for offset, where, color in ((0.2, "real", "tab:blue"), (-0.2, "simulated", "tab:orange")):
            own = [(i, found[where][kind]) for i, kind in enumerate(kinds) if kind in found[where]]
            places = [i + offset for i, _ in own]
            panel.barh(places, [r[f"p99_{key}_ms"] for _, r in own], 0.36, color=color, alpha=0.35)
            panel.barh(
                places, [r[f"median_{key}_ms"] for _, r in own], 0.36, color=color, label=where
            )
        panel.set(title=f"{label}, ms: p50, and p99 behind it", xscale="log")
        panel.set_yticks(range(len(kinds)), kinds)
        panel.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    save(figure, file)


def draw_scale(found: Sequence[Mapping[str, Any]], file: Path) -> None:
    columns = [(scale, shape) for scale in SCALES for shape in SHAPES]
    figure, axes = plt.subplots(2, len(columns), figsize=(14, 6), layout="constrained")
    for column, (scale, shape) in enumerate(columns):
        own = [p for p in found if p["scale"] == scale.name]
        for row, (key, label) in enumerate((("kept", "within limits"), ("itl_p99", "ITL p99, ms"))):
            panel = axes[row][column]
            for marker, line in zip("osv^", scale.layouts(), strict=True):
                points = curve(own, shape, line)
                panel.plot(
                    [p["rate"] for p in points],
                    [p[key] for p in points],
                    marker=marker,
                    ms=4,
                    label=line,
                )
            panel.grid(alpha=0.3)
            panel.set_ylabel(label if column == 0 else "")
        axes[1][column].set(yscale="log", xlabel="requests/s")
        axes[0][column].set_title(f"{scale.num_devices} GPUs, {scale.model}: {shape}", fontsize=9)
        axes[0][column].legend(fontsize=7)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "duetto"
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


HEAD = """# More than one engine, measured

What [the design](../design/cluster.md) promises, in numbers. Measured on a machine of two shared
cores; what is simulated says so.
"""


def put(text: str, name: str, section: str) -> str:
    """The page with a section between its marks; a new one comes last."""
    begin, end = f"<!-- {name}: written by benchmarks/cluster -->", f"<!-- end of {name} -->"
    whole = f"{begin}\n\n{section.strip()}\n\n{end}"
    if begin in text:
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        return re.sub(pattern, lambda _: whole, text, flags=re.DOTALL)
    return f"{text.rstrip()}\n\n{whole}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", action="store_true", help="simulate nothing")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if not options.again:
        SCALE.write_text(json.dumps(simulate_all(options.processes), indent=0) + "\n")
    found = json.loads(SCALE.read_text())
    text = PAGE.read_text() if PAGE.exists() else HEAD
    if REAL.exists():
        real = json.loads(REAL.read_text())["runs"]
        draw_real(real[-1], FOLDER / "cluster-schedulers.svg")
        text = put(text, "schedulers", real_section(real))
    draw_scale(found, FOLDER / "cluster-scale.svg")
    PAGE.write_text(put(text, "scale", scale_section(found)))
    print(json.dumps({"points": len(found)}))


if __name__ == "__main__":
    main()
