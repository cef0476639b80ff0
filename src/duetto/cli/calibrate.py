"""`duetto calibrate`: what this machine reaches, measured once and kept for the planner."""

import shutil
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from duetto.cli.interrupt import end_at_once
from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.core.errors import ConfigError
from duetto.core.files import check_folder
from duetto.measure.gpu import gpu_is_here, measure_gpu
from duetto.measure.host import measure_host
from duetto.pricing.find_hardware import (
    GPU,
    HOST,
    calibration_file,
    read_hardware,
    write_hardware,
)
from duetto.pricing.hardware import HardwareSpec, KernelPoint, Kind
from duetto.progress import show_progress

SECONDS_PER_LINE = 5.0  # of progress, where no bar is drawn


def calibrate(
    *,
    backend: str = "auto",
    threads: int | None = None,
    out: Path | None = None,
    show: Annotated[bool, Parameter(negative="")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure this machine, in under two minutes, and keep the result as --hardware host; or its
    GPU, as --hardware gpu.

    Parameters
    ----------
    backend
        cuda (the GPU), cpu (native) or reference; auto is what `duetto serve` would take.
    threads
        Of the cpu backend; by default as many as this process may use.
    out
        Where to keep it; by default in the user's cache directory, where it is looked for.
    show
        Measure nothing: print what is kept, with --backend cuda of the GPU.
    as_json
        The last line of stdout is one JSON document: what is kept.
    """
    is_gpu = backend == "cuda" or (backend == "auto" and not show and gpu_is_here())
    file = out or calibration_file(GPU if is_gpu else HOST)
    if file is None:
        raise ConfigError("--out: say where; this user has no home, and XDG_CACHE_HOME is not set")
    if show:
        _print_kept(file, backend, threads, as_json=as_json)
        return
    if is_gpu and threads is not None:
        raise ConfigError(f"--threads {threads} and the GPU: say --backend cpu for this host")
    file.parent.mkdir(parents=True, exist_ok=True)  # now: what it raises, it raises before the work
    check_folder("--out", file)
    with (
        TemporaryDirectory() as folder,
        end_at_once(lambda: shutil.rmtree(folder, ignore_errors=True)),
        show_progress("measuring", lines_every_s=SECONDS_PER_LINE) as bar,
    ):
        if is_gpu:
            spec = measure_gpu(on_progress=bar.reach)
        else:
            spec = measure_host(backend, threads, folder=Path(folder), on_progress=bar.reach)
    write_hardware(spec, file)
    for line in _busy_lines(spec):
        print(line, file=sys.stderr)
    if as_json:
        print_json(spec)
    else:
        _print(spec, file)


def _print_kept(file: Path, backend: str, threads: int | None, *, as_json: bool) -> None:
    if backend not in ("auto", "cuda") or threads is not None:
        raise ConfigError("--show with --backend or --threads: it measures nothing")
    if not file.is_file():
        again = "duetto calibrate" + " --backend cuda" * (backend == "cuda")
        raise ConfigError(f"--show: nothing is kept ({file} is not there); run: {again}")
    spec = read_hardware(file)
    if as_json:
        print_json(spec)
        return
    _print(spec, file)
    for line in _busy_lines(spec):
        say(open_console(), line)


def _busy_lines(spec: HardwareSpec) -> list[str]:
    if not spec.busy:
        return []
    lines = [f"warning: {note}" for note in spec.busy]
    return [*lines, "The machine was busy: let it come to rest and run duetto calibrate again."]


def _print(spec: HardwareSpec, file: Path) -> None:
    console = open_console()
    for arithmetic, peak in spec.peaks.items():
        say(console, f"{arithmetic} peak: {peak / 1e9:.4g} GFLOP/s")
    say(console, f"read bandwidth: {spec.memory_bandwidth / 1e9:.4g} GB/s")
    for size, bandwidth in spec.read_bandwidths[:-1]:
        say(console, f"  {size >> 20} MiB, read again and again: {bandwidth / 1e9:.4g} GB/s")
    for arithmetic in {"float32": None} | spec.efficiencies_of:
        if spec.kernels and all(point.arithmetic != arithmetic for point in spec.kernels):
            continue  # nothing of it was measured
        show_table(console, _table(spec, arithmetic))
        if any(p.fraction > 1.005 for p in spec.kernels if p.arithmetic == arithmetic):
            say(console, "above 100: what it reads was in a cache, and the roof is the memory's")
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
    """Achieved fraction of the roof."""
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
