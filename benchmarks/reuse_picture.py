"""Curves of reuse.py. Knows what its parts found; nothing of how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Results = Mapping[str, Any]


def draw(quality: Results, ttfts: Results, kinds: Mapping[str, str], file: Path) -> None:
    """A panel for each kind of question, and one for times to first token."""
    shown = [kind for kind in kinds if kind in quality["rows"][0]["scores"]]
    count = len(shown) + bool(ttfts)
    figure, axes = plt.subplots(
        1, count, figsize=(3.6 * count, 3.8), layout="constrained", squeeze=False
    )
    for panel, kind in zip(axes[0], shown, strict=False):
        _quality(panel, quality["rows"], kind)
        panel.set(title=kinds[kind], xlabel="share of the documents computed", ylim=(-0.02, 1.02))
    axes[0][0].set_ylabel("exact answers (bars: 95 %)")
    axes[0][0].legend(fontsize=7)
    if ttfts:
        _times(axes[0][-1], ttfts)
    matplotlib.rcParams["svg.hashsalt"] = "reuse"
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _quality(panel: Axes, rows: list[Any], kind: str) -> None:
    """Lines across for what is computed whole, and for what is reused as it is."""
    by_name = {row["name"]: row["scores"][kind]["exact_match"] for row in rows}
    for name, style in (("full prefill", "--"), ("none", ":")):
        panel.axhline(by_name[name], color="grey", lw=1.0, ls=style, label=name)
    for curve in dict.fromkeys(row["curve"] for row in rows if row["curve"]):
        points = [(row["share"], row["scores"][kind]) for row in rows if row["curve"] == curve]
        points.sort(key=lambda point: point[0])
        shares = [share for share, _ in points]
        means = [score["exact_match"] for _, score in points]
        below = [score["exact_match"] - score["low"] for _, score in points]
        above = [score["high"] - score["exact_match"] for _, score in points]
        panel.errorbar(shares, means, (below, above), fmt="o-", ms=3, lw=1.2, label=curve)
    panel.grid(alpha=0.3)


def _times(panel: Axes, ttfts: Results) -> None:
    """Times full prefill, by choice; a mark at the ceiling."""
    names = [row["name"] for row in next(iter(ttfts.values()))["rows"]]
    width = 0.8 / len(ttfts)
    for number, (key, result) in enumerate(ttfts.items()):
        _, model, quantization = key.split(", ")
        by_name = {row["name"]: row for row in result["rows"]}
        places = [place + (number - (len(ttfts) - 1) / 2) * width for place in range(len(names))]
        heights = [by_name[name]["speedup"] if name in by_name else 0.0 for name in names]
        label = f"{model}, {'bf16' if quantization == 'none' else quantization}"
        panel.bar(places, heights, width, label=label)
        for place, name in zip(places, names, strict=True):
            if "ceiling" in by_name.get(name, {}):
                panel.plot([place], [by_name[name]["ceiling"]], "k_", ms=12)
    panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    panel.set(title="speed to the first token (mark: ceiling)", ylabel="times full prefill")
    panel.grid(alpha=0.3, axis="y")
    panel.legend(fontsize=7)
