"""A picture of a simulation's beginning: who waited, computed a prompt, decoded, and when.

Needs matplotlib, which is loaded only here. The same simulation gives the same picture.
"""

from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

from duetto.pricing.pyplot import no_date, pyplot_for, titled
from duetto.simulation.replica import StepLog
from duetto.simulation.simulation import Served, Simulation

COLOURS = {
    "waiting": "#c9c9c9",
    "prompt": "#d1495b",
    "KV transfer": "#edae49",
    "decode": "#30638e",
    "shared": "#7fb069",
}
_WORDS = {
    "shared": "shared: its next token, in a step with others' prompts",
    "decode": "decode: next tokens only",
}
_MOST_STEPS = 20_000  # of a replica; more are not told apart
_MOST_LOGS = 8  # whose steps are drawn

Interval = tuple[str, float, float]  # what, from when, until when


def draw_gantt(
    simulation: Simulation, file: Path, *, title: str = "", num_requests: int = 60
) -> None:
    """The first requests as bars over time, and below them the tokens of each step.

    PNG or SVG by the file's name. Raises ConfigError for another kind, or without matplotlib.
    """
    plt = pyplot_for("--gantt", file)
    answered = [s for s in simulation.served if s.refusal is None]
    shown = answered[:num_requests]
    beginning = min(s.timings.arrival_time for s in shown)
    end = max(s.timings.token_times[-1] for s in shown)
    logs = _named_logs(simulation)
    heights = [max(2.0, 0.12 * len(shown)), *([1.1] * len(logs[:_MOST_LOGS]))]
    figure, axes = plt.subplots(
        len(heights),
        sharex=True,
        figsize=(11, sum(heights) + 1.6),
        height_ratios=heights,
        layout="constrained",
    )
    spans = [_spans(served, simulation) for served in shown]
    for row, own in enumerate(spans):
        _draw_request(axes[0], row, own)
    axes[0].set(ylabel="request", ylim=(len(shown) - 0.5, -0.5))
    axes[0].set_yticks(range(0, len(shown), max(1, len(shown) // 6)))
    for axis, (name, log) in zip(axes[1:], logs, strict=False):
        _draw_steps(axis, log, end)
        axis.set_ylabel(f"{name}\ntokens", fontsize=8)
    axes[-1].set(xlabel="s", xlim=(beginning, end))
    about = f"the first {len(shown)} of {len(answered)} requests; below the tokens of each step, "
    about += "those of prompts over next tokens"
    if len(logs) > _MOST_LOGS:
        about += f" ({_MOST_LOGS} of {len(logs)} are shown)"
    figure.suptitle("\n".join([*titled(title), about]), fontsize=10)
    seen = {name for own in spans for name, _, _ in own}
    colours = {_WORDS.get(n, n): colour for n, colour in COLOURS.items() if n in seen}
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(patches, colours, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=110, metadata=no_date(file))
    plt.close(figure)


def _named_logs(simulation: Simulation) -> list[tuple[str, StepLog]]:
    """Those that compute prompts first."""
    kind = "decode" if simulation.prefill_steps else "replica"
    return [
        (_name(kind, number, simulation.num_batches), log)
        for kind, logs in (("prefill", simulation.prefill_steps), (kind, simulation.steps))
        for number, log in enumerate(logs)
    ]


def _name(kind: str, number: int, num_batches: int) -> str:
    replica, batch = divmod(number, num_batches)
    return f"{kind} {replica}" + (f", batch {batch}" if num_batches > 1 else "")


def _spans(served: Served, simulation: Simulation) -> list[Interval]:
    """What a request did, from when until when."""
    timings = served.timings
    first = timings.token_times[0]
    begun = first if timings.first_scheduled_time is None else timings.first_scheduled_time
    instants = (timings.arrival_time, begun, first, first + served.transfer_s)
    spans = list(zip(COLOURS, instants, instants[1:], strict=False))
    spans += _streaming(served, first + served.transfer_s, simulation)
    return [(name, start, end) for name, start, end in spans if end > start]


def _streaming(served: Served, start: float, simulation: Simulation) -> list[Interval]:
    """Its next tokens: in steps of their own kind, or beside prompts of others."""
    if served.replica < 0 or not simulation.steps:
        return []
    size = simulation.num_batches
    own = simulation.steps[served.replica * size : (served.replica + 1) * size]
    beside = {
        end
        for log in own
        for end, num_prompt in zip(log.end_time, log.num_prompt_tokens, strict=True)
        if num_prompt
    }
    gaps = [
        ("shared" if end in beside else "decode", max(a, start), end)
        for a, end in pairwise(served.timings.token_times)
    ]
    stretches = [list(own) for _, own in groupby(gaps, key=lambda gap: gap[0])]
    return [(stretch[0][0], stretch[0][1], stretch[-1][2]) for stretch in stretches]


def _draw_request(axis: Any, row: int, spans: list[Interval]) -> None:
    for name, start, end in spans:
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
