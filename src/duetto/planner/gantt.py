"""A picture of a simulation's beginning: who waited, computed a prompt, decoded, and when.

Needs matplotlib, which is loaded only here. The same simulation gives the same picture.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from duetto.planner.pyplot import no_date, pyplot_for
from duetto.planner.replica import StepLog
from duetto.planner.simulation import Served, Simulation

COLOURS = {"waiting": "#c9c9c9", "prompt": "#d1495b", "KV transfer": "#edae49", "decode": "#30638e"}
_MOST_STEPS = 20_000  # of a replica; more are not told apart


def draw_gantt(simulation: Simulation, file: Path, *, num_requests: int = 60) -> None:
    """The first requests as bars over time, and below them the tokens of each step.

    PNG or SVG by the file's name. Raises ConfigError for another kind, or without matplotlib.
    """
    plt = pyplot_for("--gantt", file)
    shown = [s for s in simulation.served if s.refusal is None][:num_requests]
    end = max(s.timings.token_times[-1] for s in shown)
    logs = (*simulation.prefill_steps, *simulation.steps)
    heights = [max(2.0, 0.12 * len(shown)), *([1.1] * len(logs))]
    figure, axes = plt.subplots(
        len(heights),
        sharex=True,
        figsize=(11, sum(heights) + 0.6),
        height_ratios=heights,
        layout="constrained",
    )
    for row, served in enumerate(shown):
        _draw_request(axes[0], row, served)
    axes[0].set(ylabel="request", ylim=(len(shown), -1))
    colours = {name: colour for name, colour in COLOURS.items() if name in _names(shown)}
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes[0].legend(patches, colours, loc="lower left", fontsize=8)
    for number, log in enumerate(logs):
        is_prefill = number < len(simulation.prefill_steps)
        _draw_steps(axes[number + 1], log, end)
        axes[number + 1].set_ylabel("prefill\ntokens" if is_prefill else "tokens", fontsize=8)
    axes[-1].set(xlabel="s", xlim=(0, end))
    figure.savefig(file, dpi=110, metadata=no_date(file))
    plt.close(figure)


def _names(shown: list[Served]) -> set[str]:
    """What there is to see."""
    return {name for served in shown for name, _, _ in _spans(served)}


def _spans(served: Served) -> list[tuple[str, float, float]]:
    """What a request did, from when until when."""
    timings = served.timings
    first, last = timings.token_times[0], timings.token_times[-1]
    begun = first if timings.first_scheduled_time is None else timings.first_scheduled_time
    decode = first + served.transfer_s
    instants = (timings.arrival_time, begun, first, decode, max(decode, last))
    spans = zip(COLOURS, instants, instants[1:], strict=False)
    return [(name, start, end) for name, start, end in spans if end > start]


def _draw_request(axis: Any, row: int, served: Served) -> None:
    for name, start, end in _spans(served):
        # A transfer takes milliseconds of a minute: its edge is seen however short it is.
        edge = {"edgecolor": COLOURS[name], "linewidth": 1.2, "zorder": 3}
        is_short = name == "KV transfer"
        axis.barh(row, end - start, 0.8, start, color=COLOURS[name], **(edge if is_short else {}))


def _draw_steps(axis: Any, log: StepLog, end: float) -> None:
    """Prompt tokens on top of next tokens, over the time of each step; nothing between steps."""
    times: list[float] = []
    nexts: list[int] = []
    totals: list[int] = []
    columns = (log.start_time, log.end_time, log.num_tokens, log.num_prompt_tokens)
    for start, stop, num_tokens, num_prompt in islice(zip(*columns, strict=True), _MOST_STEPS):
        if start > end:
            break
        times += (start, start, stop, stop)
        nexts += (0, num_tokens - num_prompt, num_tokens - num_prompt, 0)
        totals += (0, num_tokens, num_tokens, 0)
    axis.fill_between(times, totals, color=COLOURS["prompt"], linewidth=0)
    axis.fill_between(times, nexts, color=COLOURS["decode"], linewidth=0)
