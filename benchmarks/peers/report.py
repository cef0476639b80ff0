"""The page of a comparison: every cell, and the ratio to the best peer."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from in_process import processor

from peers.workload import CELLS

# What the project set out to reach: Duetto's rate by the best peer's of the same precision.
TARGETS: Mapping[str, Mapping[str, float]] = {
    "bf16": {"tg B=1": 1.15, "tg B=8": 1.5, "tg B=32": 1.1, "pp 512": 1.0, "pp 2048": 1.0},
    "int8": {"tg B=1": 1.6, "tg B=8": 1.7, "tg B=32": 1.5, "pp 512": 1.6, "pp 2048": 1.6},
    "int4": {"tg B=1": 1.4, "tg B=8": 1.4, "tg B=32": 1.25, "pp 512": 1.2, "pp 2048": 1.2},
}


BY_HAND = "<!-- written by hand from here on -->\n"


def write_page(file: Path, result: Mapping[str, Any]) -> None:
    """What stands in the file by hand stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _, mark, rest = file.read_text("utf-8").partition(BY_HAND) if file.exists() else ("", "", "")
    file.write_text(page(result) + (f"\n{mark}{rest}" if mark else ""), encoding="utf-8")


def page(result: Mapping[str, Any]) -> str:
    medians: Mapping[str, Mapping[str, float]] = result["medians"]
    limits = ", ".join(f"{name} {value:.0f}" for name, value in result["limits"].items())
    lines = [
        "# On a CPU, beside its peers",
        "",
        f"`{result['model']}`, {result['threads']} threads, {platform.machine()} "
        f"({processor()}), {result['date']}, {_rounds(result['all'])} in which the "
        "systems took turns; tokens per second. "
        "pp N: a prompt of N tokens. tg B: tokens after the first of B requests with prompts of "
        "128. Written by `benchmarks/peers/compare.py`.",
        "",
        f"The machine in the same run: {limits}.",
        "",
        "| system | " + " | ".join(CELLS) + " |",
        "|---" * (len(CELLS) + 1) + "|",
    ]
    for label, cells in medians.items():
        lines.append(f"| {label} | " + " | ".join(_number(cells.get(c)) for c in CELLS) + " |")
    lines += ["", "## Duetto by the best peer of the precision (target)", ""]
    lines += ["| | " + " | ".join(CELLS) + " |", "|---" * (len(CELLS) + 1) + "|"]
    for precision, targets in TARGETS.items():
        ratios = [_ratio(medians, precision, cell, targets[cell]) for cell in CELLS]
        lines.append(f"| {precision} | " + " | ".join(ratios) + " |")
    lines += [
        "",
        "## Duetto by the roofline",
        "",
        "The rate that the machine allows: each operation at the limits above, whichever binds it, "
        "and nothing else (`duetto roofline --datasheet`).",
        "",
        "| | " + " | ".join(CELLS) + " |",
        "|---" * (len(CELLS) + 1) + "|",
    ]
    for precision, roofs in result["roofs"].items():
        ours = medians.get(f"Duetto {precision}", {})
        shares = [
            f"{ours[c] / roofs[c]:.0%} of {roofs[c]:.0f}" if c in ours else "–" for c in CELLS
        ]
        lines.append(f"| {precision} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def _ratio(
    medians: Mapping[str, Mapping[str, float]], precision: str, cell: str, target: float
) -> str:
    ours = medians.get(f"Duetto {precision}", {}).get(cell)
    peers = [
        cells[cell]
        for label, cells in medians.items()
        if label.endswith(f" {precision}") and not label.startswith("Duetto") and cell in cells
    ]
    if ours is None or not peers:
        return f"– ({target})"
    ratio = ours / max(peers)
    return (
        f"{'**' if ratio >= target else ''}{ratio:.2f}{'**' if ratio >= target else ''} ({target})"
    )


def _rounds(rates: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    counts = {len(values) for cells in rates.values() for values in cells.values()}
    fewest, most = min(counts, default=1), max(counts, default=1)
    if most == 1:
        return "one round"
    return f"medians of {most if fewest == most else f'{fewest} to {most}'} rounds"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
