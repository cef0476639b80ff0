"""`duetto calibrate`: what this machine reaches, measured once and kept for the planner."""

import shutil
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from duetto.cli.interrupt import end_at_once
from duetto.cli.measure_host import measure_host
from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.planner.find_hardware import calibration_file, write_hardware
from duetto.planner.hardware import HardwareSpec, KernelPoint, Kind
from duetto.progress import show_progress


def calibrate(
    *,
    backend: str = "auto",
    threads: int | None = None,
    out: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure this machine, in under two minutes, and keep the result as --hardware host.

    Parameters
    ----------
    backend
        cpu (native) or reference; auto is what `duetto serve` would take.
    threads
        Of the cpu backend; by default as many as this process may use.
    out
        Where to keep it; by default in the user's cache directory, where it is looked for.
    as_json
        The last line of stdout is one JSON document: what is kept.
    """
    file = out or calibration_file()
    with (
        TemporaryDirectory() as folder,
        end_at_once(lambda: shutil.rmtree(folder, ignore_errors=True)),
        show_progress("measuring") as bar,
    ):
        spec = measure_host(backend, threads, folder=Path(folder), on_progress=bar.reach)
    write_hardware(spec, file)
    if as_json:
        print_json(spec)
    else:
        _print(spec, file)


def _print(spec: HardwareSpec, file: Path) -> None:
    console = open_console()
    for arithmetic, peak in spec.peaks.items():
        say(console, f"{arithmetic} peak: {peak / 1e9:.4g} GFLOP/s")
    say(console, f"read bandwidth: {spec.memory_bandwidth / 1e9:.4g} GB/s")
    for size, bandwidth in spec.read_bandwidths[:-1]:
        say(console, f"  {size >> 20} MiB, read again and again: {bandwidth / 1e9:.4g} GB/s")
    for arithmetic in {"float32": None} | spec.efficiencies_of:
        show_table(console, _table(spec, arithmetic))
        reached = spec.reached(arithmetic)
        say(
            console,
            f"the engine besides: {reached.step_s * 1e6:.0f} us a step, "
            f"{reached.logit_row_s * 1e6:.0f} us for each token it samples",
        )
    if spec.cached is not None:
        warm = spec.cached.efficiencies
        say(
            console,
            f"\nmodels of up to {spec.cached.most_bytes >> 20} MiB stay in the caches, and there "
            f"the engine takes {warm.step_s * 1e6:.0f} us a step besides, "
            f"{warm.logit_row_s * 1e6:.0f} us for each token it samples",
        )
    say(console, f"{spec.source}, {spec.date}; kept in {file}")


def _table(spec: HardwareSpec, arithmetic: str) -> Table:
    """Achieved fraction of the roof: of memory's, a kernel whose numbers are in a cache may have
    more than all."""
    points = [point for point in spec.kernels if point.arithmetic == arithmetic]
    kinds = list(dict.fromkeys(point.kind for point in points))
    table = Table(title=f"\n{arithmetic}: percent of the roof", title_justify="left", box=None)
    for heading in ("requests", "tokens of each", "in the cache", *kinds):
        table.add_column(heading, justify="right")
    by_size: dict[tuple[int, int, int], dict[Kind, KernelPoint]] = defaultdict(dict)
    for point in points:
        size = point.requests, point.rows // point.requests, point.context
        by_size[size][point.kind] = point
    for size, own in by_size.items():
        shown = (f"{min(100 * own[kind].fraction, 999):.0f}" for kind in kinds)
        table.add_row(*map(str, size), *shown)
    return table
