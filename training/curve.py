"""The loss of a climb as a PNG, with the rungs marked where they were passed."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.checkpoint import Progress

SMOOTHING = 0.95  # share of the mean so far in the drawn line
NAME_GAP = 0.025  # of the width: the least between two rungs' names


def draw_curve(progress: Progress, file: Path, title: str) -> None:
    """Loss on answers over millions of tokens, on a logarithmic scale."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    millions = [tokens / 1e6 for tokens, _ in progress.losses]
    axes.plot(millions, [loss for _, loss in progress.losses], color="0.8", linewidth=0.7)
    axes.plot(millions, _smooth([loss for _, loss in progress.losses]), color="C0")
    last = {score["rung"]: score["num_tokens"] / 1e6 for score in progress.scores}
    gap = NAME_GAP * max([*millions, *last.values()], default=0.0)
    for (rung, place), at in zip(last.items(), _apart(list(last.values()), gap), strict=True):
        axes.axvline(place, color="0.6", linewidth=0.6, linestyle=":")
        axes.text(at, 1.01, rung, rotation=45, fontsize=7, va="bottom", ha="left",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_title(title, pad=40)
    axes.set(xlabel="tokens, millions", ylabel="loss on answers")
    if progress.losses:
        axes.set_yscale("log")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _apart(places: list[float], gap: float) -> list[float]:
    """Rising places, moved up where they are nearer than `gap` to the one before."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    return moved


def _smooth(losses: list[float]) -> list[float]:
    """Exponential means, without the bias of the start."""
    smooth, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth
