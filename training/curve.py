"""The loss of a climb as a PNG, with the rungs marked where they were passed."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.checkpoint import Progress

SMOOTHING = 0.95  # share of the mean so far in the drawn line


def draw_curve(progress: Progress, file: Path, title: str) -> None:
    """Loss on answers over millions of tokens, on a logarithmic scale."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    millions = [tokens / 1e6 for tokens, _ in progress.losses]
    axes.plot(millions, [loss for _, loss in progress.losses], color="0.8", linewidth=0.7)
    axes.plot(millions, _smooth([loss for _, loss in progress.losses]), color="C0")
    last = {score["rung"]: score["num_tokens"] / 1e6 for score in progress.scores}
    for rung, place in last.items():
        axes.axvline(place, color="0.6", linewidth=0.6, linestyle=":")
        axes.text(place, 1.0, f" {rung}", rotation=90, fontsize=7, va="top", ha="right",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(title=title, xlabel="tokens, millions", ylabel="loss on answers")
    if progress.losses:
        axes.set_yscale("log")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _smooth(losses: list[float]) -> list[float]:
    """Exponential means, without the bias of the start."""
    smooth, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth
