"""`duetto bench kernels`: what each kernel reaches of what the machine gives."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.table import Table

from duetto.backends.cpu.native import choose_isa, in_words, native, why_unavailable
from duetto.cli.bench_gpu_kernels import time_gpu_kernels
from duetto.cli.interrupt import end_at_once
from duetto.cli.kernel_report import kernel_report
from duetto.cli.output import JsonFlag, open_console, say, show_table
from duetto.core.errors import ConfigError
from duetto.measure.kernels import KernelBench, Machine, Measured, Widths, most_bytes
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.progress import show_progress
from duetto.runner.host_memory import available_memory_bytes

WeightName = Literal["f32", "f16", "bf16", "bf12", "int8", "int4", "fp8"]
KvName = Literal["f32", "f16", "bf16", "int8", "fp8"]
KernelName = Literal["linear", "attention", "rows"]
MeasuredBackend = Literal["cpu", "cuda"]
CPU_WEIGHTS = ("bf16", "bf12", "int8", "int4")
CPU_KV = ("bf16", "int8")
_ONLY_GPU = {"weights": ("f16", "fp8"), "kv": ("fp8",)}


def kernels(
    model: str = "llama-3.2-1b",
    *,
    backend: MeasuredBackend = "cpu",
    kernel: Annotated[tuple[KernelName, ...], Parameter(consume_multiple=True, negative="")] = (
        "linear",
        "attention",
        "rows",
    ),
    rows: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (
        1,
        4,
        8,
        32,
        512,
    ),
    weights: Annotated[
        tuple[WeightName, ...] | None, Parameter(consume_multiple=True, negative="")
    ] = None,
    kv: Annotated[tuple[KvName, ...] | None, Parameter(consume_multiple=True, negative="")] = None,
    threads: int = 0,
    as_json: JsonFlag = False,
) -> None:
    """Time the kernels of a backend on a model's shapes, beside this machine's own speed.

    Bandwidth and arithmetic peaks are measured in the same run, again and again; the best counts.
    No weights are read: numbers are random. Takes a minute or two.

    Parameters
    ----------
    model
        A checkpoint directory, a config.json, or a named shape.
    backend
        cpu (native), or cuda: this machine's GPU.
    kernel
        Which kinds: linear, attention, rows.
    rows
        Tokens in a step; above 32 (cuda: 256), attention is that of a prompt.
    weights
        Formats of weights: f32, bf16, bf12 (the same without loss, which the cpu backend keeps
        models in bf16 in), int8 (groups of 128), int4 (groups of 64); with cuda also f16 and fp8.
        By default all that the backend has of those in 16 bits and less, but f16.
    kv
        Formats of keys and values: f32, f16, bf16, int8; with cuda also fp8. By default bf16 and
        those in 8 bits.
    threads
        Of the cpu backend; 0: as many as this process may use.
    as_json
        The last line of stdout is one JSON document.
    """
    if not rows or min(rows) < 1:
        raise ConfigError("--rows: must be numbers from 1, like 1 8 512")
    if backend == "cuda":
        if threads:
            raise ConfigError(f"--threads {threads} and --backend cuda: a GPU computes")
        time_gpu_kernels(model, kernel, rows, weights, kv, as_json=as_json)
        return
    _check_of_cpu(weights or (), kv or ())
    _time_native(model, kernel, rows, weights or CPU_WEIGHTS, kv or CPU_KV, threads, as_json)


def _check_of_cpu(weights: Sequence[str], kv: Sequence[str]) -> None:
    for flag, given in (("weights", weights), ("kv", kv)):
        for name in given:
            if name in _ONLY_GPU[flag]:
                raise ConfigError(f"--{flag} {name}: is for --backend cuda only")


def _time_native(
    model: str,
    kernel: tuple[KernelName, ...],
    rows: tuple[int, ...],
    weights: Sequence[Any],
    kv: Sequence[Any],
    threads: int,
    as_json: bool,
) -> None:
    if (missing := why_unavailable()) is not None:
        raise ConfigError(f"there are no native kernels: {missing}")
    widths = Widths.of(build_program(find_config(model)))
    needed, available = most_bytes(widths, max(rows)), available_memory_bytes()
    if needed > available:
        raise ConfigError(
            f"--rows {max(rows)}: takes about {needed / 2**30:.1f} GiB of memory; "
            f"{available / 2**30:.1f} GiB are available"
        )
    isa, pool = choose_isa(), in_words("--threads", native.Pool, threads)
    results: list[Measured] = []
    bench: KernelBench | None = None

    show = kernel_report(
        lambda: None if bench is None else bench.machine, results, _print, as_json=as_json
    )
    with end_at_once(lambda: show(True)), show_progress("kernels") as bar:
        bench = KernelBench(native, pool, isa, widths)
        for result in _measure(bench, kernel, rows, weights, kv):
            results.append(result)
            bar.advance()
    show(False)


def _measure(
    bench: KernelBench,
    kernel: tuple[KernelName, ...],
    rows: tuple[int, ...],
    weights: Sequence[Any],
    kv: Sequence[Any],
) -> Iterator[Measured]:
    if "linear" in kernel:
        yield from bench.linears(weights, rows)
    if "attention" in kernel:
        yield from bench.attention(kv, rows)
    if "rows" in kernel:
        yield from bench.by_rows(rows)


def _print(machine: Machine, results: list[Measured]) -> None:
    console = open_console()
    peaks = ", ".join(f"{name} {peak / 1e9:.0f}" for name, peak in machine.peaks.items())
    say(
        console,
        f"{machine.isa}, {machine.num_threads} threads: reads {machine.read_bandwidth / 1e9:.1f} "
        f"GB/s, multiplies {peaks} GOPS, barrier {machine.barrier_ns:.0f} ns",
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("kernel", "shape", "format"):
        table.add_column(heading)
    for heading in ("rows", "µs", "GB/s", "GOPS", "of machine"):
        table.add_column(heading, justify="right")
    for result in results:
        limit = result.limit(machine)
        table.add_row(
            result.kernel,
            result.shape,
            result.format,
            str(result.rows),
            f"{result.seconds * 1e6:.1f}",
            f"{result.num_bytes / result.seconds / 1e9:.1f}",
            f"{result.num_ops / result.seconds / 1e9:.0f}" if result.num_ops else "",
            "in cache" if limit is None else f"{limit / result.seconds:.0%}",
        )
    show_table(console, table, drop=("GOPS", "GB/s"))
    if any(_share(result, machine) > 1.005 for result in results):
        say(
            console,
            "of machine above 100%: a cache held part of what it reads, or the machine was busy "
            "when its own speed was measured",
        )


def _share(result: Measured, machine: Machine) -> float:
    """Of what the machine gives; 0 where there is no such limit."""
    return (result.limit(machine) or 0.0) / result.seconds
