"""A log-log picture of a roofline, with the operations of the steps on it.

Needs matplotlib, which is loaded only here. The same prices give the same picture.
"""

from pathlib import Path
from typing import Any

from duetto.planner.cost_model import OpPrice
from duetto.planner.pyplot import no_date, pyplot_for
from duetto.planner.roofline import Roofline

_LABELLED = 0.04  # of a step's time
_STEPS = {"prefill": ("o", "#d1495b"), "mixed": ("^", "#b8860b"), "decode": ("s", "#30638e")}


def draw_roofline(found: Roofline, arithmetic: str, file: Path) -> None:
    """The two roofs, and each operation at its intensity and at the FLOP/s it is to reach.

    The larger the mark, the larger its share of its step. PNG or SVG by the file's name. Raises
    ConfigError for another kind, and without matplotlib.
    """
    plt, hardware = pyplot_for("--picture", file), found.hardware
    figure, axis = plt.subplots(figsize=(10, 6.5), layout="constrained")
    shown = {
        name: [op for op in step.operations if op.flops and op.bytes_moved]
        for name, step in found.steps.items()
    }
    intensities = [op.intensity for ops in shown.values() for op in ops]
    peak = hardware.peaks[arithmetic]
    balance = hardware.balance(arithmetic)
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 10 * balance) * 4
    axis.plot(
        [low, balance, high], [low * hardware.memory_bandwidth, peak, peak], color="black", lw=1.5
    )
    axis.axvline(balance, color="black", lw=0.6, ls=":")
    axis.annotate(
        f"{peak / 1e12:.4g} TFLOP/s ({arithmetic})", (high, peak), (-4, 5), ha="right", **_OFFSET
    )
    axis.annotate(
        f"{hardware.memory_bandwidth / 1e9:.4g} GB/s",
        (low, low * hardware.memory_bandwidth),
        (10, 22),
        rotation=38,
        **_OFFSET,
    )
    axis.annotate(  # at the bottom, where no mark is: operations at the balance are fast ones
        f"{balance:.3g} FLOP/byte",
        (balance, 0),
        (4, 5),
        xycoords=("data", "axes fraction"),
        **_OFFSET,
    )
    for name, ops in shown.items():
        _draw_step(axis, name, ops, found.steps[name].time_s)
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="arithmetic intensity, FLOP per byte of memory traffic",
        ylabel="FLOP/s of one device",
        title=f"{hardware.name}: area of a mark is its share of the step",
    )
    axis.grid(which="major", lw=0.3)
    axis.legend(loc="lower right", markerscale=0.8)
    figure.savefig(file, dpi=120, metadata=no_date(file))
    plt.close(figure)


_OFFSET: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}


def _draw_step(axis: Any, name: str, ops: list[OpPrice], time_s: float) -> None:
    marker, colour = _STEPS[name]
    speeds = [op.flops / op.time_s for op in ops]
    shares = [op.time_s / time_s for op in ops]
    axis.scatter(
        [op.intensity for op in ops],
        speeds,
        s=[12 + 500 * share for share in shares],
        marker=marker,
        color=colour,
        alpha=0.75,
        edgecolors="white",
        linewidths=0.5,
        label=f"{name}: {time_s * 1e3:.4g} ms",
        zorder=3,
    )
    largest = {op.kind: op for op in sorted(ops, key=lambda op: op.time_s)}
    for kind, op in largest.items():  # marks of one kind are close together
        if op.time_s / time_s > _LABELLED:
            label = "matrix products" if kind == "linear" else op.name
            place = (op.intensity, op.flops / op.time_s)
            axis.annotate(label, place, (4, -16), color=colour, **_OFFSET)
