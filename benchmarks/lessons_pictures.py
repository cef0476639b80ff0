"""The pictures of lessons.py. Knows names of lines and numbers; nothing of what was simulated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import FuncFormatter, LogFormatter

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Results = Mapping[str, Sequence[tuple[float, Mapping[str, float]]]]  # curves, by line


def draw(
    lines: Results,
    panels: Sequence[tuple[str, str]],
    x_label: str,
    file: Path,
    *,
    title: str = "",
    **axis: Any,
) -> None:
    """A panel for each (key, label), a curve for each line."""
    width = 3.9 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.3), layout="constrained")
    tried = sorted({x for curve in lines.values() for x, _ in curve})
    for panel, (key, label) in zip(axes, panels, strict=True):
        for name, curve in lines.items():
            panel.plot([x for x, _ in curve], [v[key] for _, v in curve], "o-", ms=3, label=name)
        panel.set(xlabel=x_label, ylabel=label, **axis)
        plain_numbers(panel)
        if axis.get("xscale") == "log":
            panel.set_xticks(tried, [f"{x:g}" for x in tried], fontsize=8)
            panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, file)


def plain_numbers(panel: Any) -> None:
    """Of a logarithmic axis: 40, not 4 times a power of ten."""
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(_PlainMinor(minor_thresholds=(2, 1)))


class _PlainMinor(LogFormatter):
    """Labels where matplotlib would, without powers."""

    def __call__(self, value: float, place: int | None = None) -> str:
        return f"{value:,g}" if super().__call__(value, place) else ""


def draw_splits(
    lines: Results, shapes: Mapping[str, tuple[int, int]], file: Path, *, title: str = ""
) -> None:
    """Lines that lie on each other are told apart by their widths: each is thinner than those
    under it."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), layout="constrained", sharex="col")
    for column, (shape, (prompt, answer)) in enumerate(shapes.items()):
        for row, (key, label) in enumerate(
            (("attainment", "requests within limits"), ("itl_p99", "ITL p99, ms"))
        ):
            panel = axes[row][column]
            own = [name for name in lines if name.startswith(f"{shape}:")]
            for depth, name in enumerate(own):
                wide = len(own) - depth
                panel.plot(
                    [x for x, _ in lines[name]],
                    [values[key] for _, values in lines[name]],
                    "k--" if "over" in name else "-",
                    marker="os^vDx"[depth],
                    lw=0.2 + 0.8 * wide,
                    ms=2 + wide,
                    label=name.split(": ")[1],
                )
            panel.grid(alpha=0.3)
            panel.set_ylabel(label if column == 0 else "")
        axes[1][column].set(yscale="log", xlabel="requests/s")
        plain_numbers(axes[1][column])
        axes[0][column].set_title(f"{shape}: {prompt} + {answer} tokens", fontsize=10)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "duetto"
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
