"""The page and the picture of `planner_host.py`: predicted against measured.

Knows no engine and no simulator.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from in_process import markdown_table, today

METRICS = ("ttft", "itl", "e2e")
PRICES = ("fitted", "calibrated")
MEAN_LIMIT, TAIL_LIMIT = 0.10, 0.20  # median absolute error of means, and of p99s
Pair = tuple[float, float]  # measured, predicted


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one load. Latencies in milliseconds."""

    model: str
    load: float
    requests_per_s: float
    length_scale: float
    same_batches: bool  # with the real steps' times
    num_steps: int
    mean: dict[str, dict[str, Pair]]  # by the price's name, then the metric
    p99: dict[str, dict[str, Pair]]

    def errors(self, price: str, which: str) -> dict[str, float]:
        values: dict[str, dict[str, Pair]] = getattr(self, which)
        return {name: abs(said / real - 1) for name, (real, said) in values[price].items()}


@dataclass(frozen=True, slots=True)
class StepRow:
    """Steps of one kind: how long they took, and what was said of them (medians)."""

    model: str
    kind: str
    count: int
    measured_ms: float
    ratios: dict[str, float]  # predicted over measured, by the price's name


def medians(rows: Sequence[Row], price: str, which: str) -> dict[str, float]:
    return {
        name: statistics.median(row.errors(price, which)[name] for row in rows) for name in METRICS
    }


def draw(rows: Sequence[Row], file: Path) -> None:
    """Predicted over measured, for means and p99s; within the band is within the limit. Hollow is
    what the calibration alone says."""
    matplotlib.use("Agg")
    plt = __import__("matplotlib.pyplot", fromlist=["pyplot"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
    for panel, which, limit in zip(axes, ("mean", "p99"), (MEAN_LIMIT, TAIL_LIMIT), strict=True):
        points = [v for row in rows for each in getattr(row, which).values() for v in each.values()]
        ends = np.array([min(min(v) for v in points) * 0.7, max(max(v) for v in points) * 1.4])
        panel.fill_between(ends, ends * (1 - limit), ends * (1 + limit), alpha=0.2, color="grey")
        panel.plot(ends, ends, color="grey", lw=0.8)
        for marker, name in zip("os^", METRICS, strict=True):
            for colour, model in enumerate(dict.fromkeys(row.model for row in rows)):
                for price, fill in zip(PRICES, ("full", "none"), strict=True):
                    own = [getattr(row, which)[price][name] for row in rows if row.model == model]
                    label = f"{name.upper()}, {model}" if fill == "full" else None
                    look = {"color": f"C{colour}", "fillstyle": fill, "label": label}
                    panel.plot(*zip(*own, strict=True), marker, **look)
        panel.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
        panel.set_title(f"{which}; band: {limit:.0%}")
    axes[0].legend(fontsize=7)
    plt.rcParams["svg.hashsalt"] = "duetto"
    figure.savefig(file, metadata={"Date": None})


def page(rows: Sequence[Row], steps: Sequence[StepRow], about: str, picture: str) -> str:
    def cells(row: Row, which: str) -> list[str]:
        values = getattr(row, which)
        return [
            f"{values['fitted'][name][0]:.1f} / "
            + " / ".join(f"{values[price][name][1]:.1f}" for price in PRICES)
            for name in METRICS
        ]

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
    errors = [
        [
            f"{price}, {which}",
            *(f"{value:.1%}" for value in medians(rows, price, which).values()),
            f"{limit:.0%}",
        ]
        for price in PRICES
        for which, limit in (("mean", MEAN_LIMIT), ("p99", TAIL_LIMIT))
    ]
    kinds = [
        [
            f"{each.model}, {each.kind}",
            str(each.count),
            f"{each.measured_ms:.2f}",
            *(f"{each.ratios[price]:.2f}" for price in PRICES),
        ]
        for each in steps
    ]
    scales = dict.fromkeys(f"{row.model} {row.length_scale:.3f}" for row in rows)
    return f"""# The simulator, against this host

Written by `benchmarks/planner_host.py` on {today()}; do not edit.
{about}

Measured / predicted with the fitted price / with the calibrated one, in milliseconds. *Fitted*: to
steps of the same model, right before each load, on requests that are not of the trace.
*Calibrated*: what `duetto simulate --hardware host` takes; it has never seen the model.
The load is a part of the rate at which the model answers the requests when all are there at once.
*Batches*: whether the simulator, with the real steps' times, gave the real schedule, batch by batch
(steps). Lengths are those of the trace, times: {", ".join(scales)}.

{markdown_table(["", "requests/s", *heads, "batches"], compared)}

![Predicted over measured; hollow: calibrated]({picture})

Median absolute error over models and loads:

{markdown_table(["", *(name.upper() for name in METRICS), "limit"], errors)}

Step by step, all loads together: the median step, and the median of predicted over measured:

{markdown_table(["", "steps", "ms", *PRICES], kinds)}

How to read it. ITL follows from the price of a step. TTFT is a queue's: near saturation it
multiplies whatever a step is mispriced by, so look at the highest load. What the price cannot know
is what else the machine does: a long gap that another process caused is in the measured p99 only.
Minutes lie between a calibration and a load. Where the machine's speed changes meanwhile, as that
of shared ones does by ten percent within seconds, the calibrated price is off by as much, and a
queue by more.
"""
