"""A report for people. The same numbers for programs: Report.as_json."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from duetto.cli.output import say, show_table
from duetto.core.draft_counts import Chains, tokens_per_step
from duetto.measure.metrics import Distribution, LengthsSeen, Report


def print_report(report: Report, console: Console, *, notes: Sequence[str] = ()) -> None:
    """Counts, rates, one row per latency in milliseconds, and whatever a reader must know."""
    show_table(console, _latencies(report))
    answers = f"{report.num_ok} of {report.num_requests} requests answered"
    if report.num_ok < report.num_requests:
        answers += f" ({report.num_failed} failed, {report.num_aborted} aborted)"
    say(console, f"{answers} in {report.duration_s:.2f} s")
    num_tokens = report.num_input_tokens + report.num_output_tokens
    say(
        console,
        f"{report.per_second(report.num_ok):.2f} requests/s, "
        f"{report.per_second(report.num_output_tokens):.1f} output tokens/s, "
        f"{report.per_second(num_tokens):.1f} tokens/s with prompts",
    )
    for what, lengths in (("prompts", report.prompt_lengths), ("answers", report.output_lengths)):
        if lengths.got:
            say(console, f"{what} of {_lengths(lengths)}")
    if report.num_input_tokens:
        share = report.num_cached_tokens / report.num_input_tokens
        say(console, f"{report.num_cached_tokens} prompt tokens cached ({share:.0%})")
    if report.drafts.proposed:
        say(console, _drafts(report.drafts, report.num_output_tokens))
    if report.slo is not None and report.num_good is not None:
        limits = ", ".join(f"{name} {ms:g} ms" for name, ms in report.slo.as_ms().items())
        say(
            console,
            f"goodput {report.per_second(report.num_good):.2f} requests/s: "
            f"{report.num_good} of {report.num_requests} met {limits}",
        )
    for note in notes:
        say(console, f"note: {note}")
    for message, times in report.errors.items():
        say(console, f"error, {times} times: {message}")


def _drafts(drafts: Chains, num_output_tokens: int) -> str:
    """Acceptance in all, and of the first, second, ... draft of a chain where that is known."""
    count = drafts.total
    per_step = tokens_per_step(num_output_tokens, count.num_accepted) or 1.0
    words = (
        f"{count.num_accepted} of {count.num_proposed} drafts accepted "
        f"({count.acceptance or 0.0:.0%}), {per_step:.2f} tokens a step"
    )
    if not drafts.num_chains:
        return words
    pairs = zip(drafts.accepted, drafts.proposed, strict=True)
    return f"{words}; by place {', '.join(f'{a / p:.0%}' for a, p in pairs if p)}"


def _lengths(lengths: LengthsSeen) -> str:
    """Mean and range in tokens, and those asked for where they are others."""
    told = f"{_range(lengths.got)} tokens"
    if lengths.asked is None:
        return told
    return (
        f"{told}, as asked" if lengths.are_as_asked else f"{told}; asked: {_range(lengths.asked)}"
    )


def _range(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low}" if low == high else f"{low} to {high} (mean {sum(lengths) / len(lengths):.1f})"


def print_parts(parts_s: Mapping[str, float], console: Console) -> None:
    """The parts of the mean latency (docs/metrics.md)."""
    shown = ", ".join(f"{part} {spent * 1000:.1f}" for part, spent in parts_s.items())
    say(console, f"mean E2E latency in parts, ms: {shown}")


def _latencies(report: Report) -> Table:
    table = Table("ms", box=None, pad_edge=False)
    percentiles = list(report.ttft.percentiles)
    for heading in ("mean", *(f"p{p:g}" for p in percentiles), "max"):
        table.add_column(heading, justify="right")
    rows: list[tuple[str, Distribution]] = [
        ("TTFT", report.ttft),
        ("ITL", report.itl),
        ("TPOT", report.tpot),
        ("E2E", report.e2e),
    ]
    if (report.held.max or 0.0) > 0.01:  # the client was late: the arrival tells another story
        rows += [
            ("TTFT from arrival", report.ttft_from_arrival),
            ("E2E from arrival", report.e2e_from_arrival),
            ("client delay", report.held),
        ]
    for name, values in rows:
        numbers = (values.mean, *(values.percentiles[p] for p in percentiles), values.max)
        table.add_row(name, *("-" if x is None else f"{x * 1000:.2f}" for x in numbers))
    return table
