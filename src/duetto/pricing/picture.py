"""A log-log picture of a roofline, with the operations of the steps on it.

Needs matplotlib, which is loaded only here. The same prices give the same picture.
"""

from pathlib import Path
from typing import Any

from duetto.pricing.cost_model import OpPrice
from duetto.pricing.pyplot import no_date, pyplot_for, titled
from duetto.pricing.roofline import Roofline

_STEPS = {"prefill": "o", "mixed": "^", "decode": "s"}
_KINDS = {  # by colour: every mark has a name in the legend, and none needs a label of its own
    "linear": ("matrix products", "#30638e"),
    "attention": ("attention", "#d1495b"),
    "activation": ("activations", "#b8860b"),
    "norm": ("norms", "#7fb069"),
    "rope": ("rope", "#7a5195"),
    "add": ("additions", "#00a6a6"),
    "collective": ("between devices", "#ff7f50"),
}
_OTHER = ("others", "#888888")


def draw_roofline(found: Roofline, arithmetic: str, file: Path, *, title: str = "") -> None:
    """The two roofs, and each operation at its intensity and at the FLOP/s it is to reach.

    The larger the mark, the larger its share of its step. PNG or SVG by the file's name. Raises
    ConfigError for another kind, and without matplotlib.
    """
    plt, hardware = pyplot_for("--picture", file), found.hardware
    figure, axis = plt.subplots(figsize=(11, 6.5), layout="constrained")
    shown = {
        name: [op for op in step.operations if op.flops and op.bytes_moved]
        for name, step in found.steps.items()
    }
    intensities = [op.intensity for ops in shown.values() for op in ops]
    peak, bandwidth = hardware.peaks[arithmetic], hardware.memory_bandwidth
    balance = hardware.balance(arithmetic)
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 10 * balance) * 4
    (roofs,) = axis.plot([low, balance, high], [low * bandwidth, peak, peak], color="black", lw=1.5)
    turn = axis.axvline(balance, color="black", lw=0.6, ls=":")
    for name, ops in shown.items():
        _draw_step(axis, name, ops, found.steps[name].time_s)
    about = "area of a mark: its share of its step"
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="arithmetic intensity, FLOP per byte of memory traffic",
        ylabel="FLOP/s of one device",
    )
    axis.set_title("\n".join([*titled(title or hardware.name), about]), fontsize=10)
    axis.grid(which="major", lw=0.3)
    marks = {
        f"{name}: {_ms(step.time_s)}": plt.Line2D([], [], ls="", marker=_STEPS[name], color="black")
        for name, step in found.steps.items()
    }
    kinds = dict.fromkeys(_kind(op) for ops in shown.values() for op in ops)
    marks |= {words: plt.Rectangle((0, 0), 1, 1, color=colour) for words, colour in kinds}
    marks[f"{peak / 1e12:.4g} TFLOP/s ({arithmetic}),\n{bandwidth / 1e9:.4g} GB/s"] = roofs
    marks[f"balance, {balance:.3g} FLOP/byte"] = turn
    figure.legend(marks.values(), marks, loc="outside right upper", fontsize=9)
    figure.savefig(file, dpi=120, metadata=no_date(file))
    plt.close(figure)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"


def _kind(op: OpPrice) -> tuple[str, str]:
    return _KINDS.get(op.kind, _OTHER)


def _draw_step(axis: Any, name: str, ops: list[OpPrice], time_s: float) -> None:
    axis.scatter(
        [op.intensity for op in ops],
        [op.flops / op.time_s for op in ops],
        s=[12 + 500 * op.time_s / time_s for op in ops],
        marker=_STEPS[name],
        color=[_kind(op)[1] for op in ops],
        alpha=0.75,
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
    )
