"""Curves of speculation.py. Knows what its parts found; nothing of how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Results = Mapping[str, Any]


def draw(speeds: Results, losses: Results, file: Path) -> None:
    """Speed over acceptance beside what prices allow, prices of steps, and what bad drafts cost."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for key, result in speeds.items():
        _, model, quantization = key.split(", ")
        name = f"{model}, {'bf16' if quantization == 'none' else quantization}"
        for batch, times in result["step_s"].items():
            rows = [row for row in result["rows"] if row["batch"] == int(batch)]
            alphas = [row["alpha"] for row in rows]
            line = axes[0].plot(
                alphas, [r["ratio"] for r in rows], "o-", ms=4, label=f"{name}, B = {batch}"
            )
            color = line[0].get_color()
            axes[0].plot(alphas, [r["allowed"] for r in rows], ":", color=color)
            prices = [seconds / times[0] for seconds in times]
            axes[1].plot(result["num_drafts"], prices, "o-", ms=3, color=color)
    for key, result in losses.items():
        for name in dict.fromkeys(row["drafts"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["drafts"] == name]
            label = f"{name} ({key.split(', ')[2]})"
            axes[2].plot([r["batch"] for r in rows], [r["ratio"] for r in rows], "o-", label=label)
    axes[0].set(xlabel="acceptance α", ylabel="times plain decoding (dotted: prices allow)")
    axes[1].set(xlabel="drafts of each request, K", ylabel="a step, times one without drafts")
    axes[2].set(xlabel="requests", ylabel="times plain decoding", xscale="log", ylim=(0.9, 1.05))
    axes[2].axhline(0.98, color="grey", lw=0.8, ls="--")
    for panel in axes:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    matplotlib.rcParams["svg.hashsalt"] = "speculation"
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
