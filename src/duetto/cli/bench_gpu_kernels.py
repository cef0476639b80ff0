"""`duetto bench kernels --backend cuda`: what each GPU kernel reaches of what the device gives."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.table import Table

from duetto.checkpoints.config import ModelConfig
from duetto.cli.interrupt import end_at_once
from duetto.cli.kernel_report import kernel_report
from duetto.cli.output import open_console, say, show_table
from duetto.core.errors import ConfigError
from duetto.measure.gpu_kernels import GpuKernel, GpuKernelBench, GpuMachine
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.program.ops import Linear
from duetto.program.program import Program
from duetto.progress import show_progress

WEIGHTS = ("bf16", "int8", "int4", "fp8")
KV = ("bf16", "int8", "fp8")
UNCACHED_BYTES = 256 << 20  # of one projection's copies in all layers: no cache holds it
_LONG = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_KINDS: Mapping[str, Sequence[str]] = {
    "linear": ("linear",),
    "attention": ("attention",),
    "rows": ("norm", "rope", "activation", "add", "embed", "copy"),
}


def time_gpu_kernels(
    model: str,
    kernel: Sequence[str],
    rows: Sequence[int],
    weights: Sequence[str] | None,
    kv: Sequence[str] | None,
    *,
    as_json: bool,
    shrink: int = 1,
    runs: int = 5,
) -> None:
    """Raises ConfigError, in one line, where there is no GPU that can be used."""
    kept = [_long("weights", name) for name in weights or WEIGHTS]
    stored = [_long("kv", name) for name in kv or KV]
    config = find_config(model)
    program = few_layers(config)
    dtype = next((name for name in kept if name in _LONG.values()), "bfloat16")
    results: list[GpuKernel] = []
    bench: GpuKernelBench | None = None

    show = kernel_report(
        lambda: None if bench is None else bench.machine, results, _print, as_json=as_json
    )
    with end_at_once(lambda: show(True)), show_progress("kernels") as bar:
        bench = GpuKernelBench(program, dtype, shrink, runs)
        kinds = [kind for name in kernel for kind in _KINDS[name]]
        for result in bench.kernels(kept, stored, rows):  # type: ignore[arg-type]
            if result.kind in kinds:
                results.append(result)
            bar.advance()
    show(False)


def few_layers(config: ModelConfig) -> Program:
    """The first layers of a model, but so many that caches hold no projection of all of them."""
    program = build_program(config)
    numbers = [op.out.width * op.x.width for op in program.ops if isinstance(op, Linear)]
    count = -(-UNCACHED_BYTES // (2 * min(numbers)))
    return build_program(replace(config, layers=config.layers[:count]))


def _long(flag: str, name: str) -> str:
    if name == "bf12":
        raise ConfigError(f"--{flag} bf12: is for --backend cpu only")
    return _LONG.get(name, name)


def _print(machine: GpuMachine, results: Sequence[GpuKernel]) -> None:
    console = open_console()
    peaks = ", ".join(f"{name} {peak / 1e12:.0f}" for name, peak in machine.peaks.items())
    say(
        console,
        f"{machine.name}: reads {machine.read_bandwidth / 1e12:.2f} TB/s, copies "
        f"{machine.copy_bandwidth / 1e12:.2f} TB/s, multiplies {peaks} TFLOP/s",
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("kernel", "shape", "format"):
        table.add_column(heading)
    for heading in ("rows", "µs", "GB/s", "TFLOP/s", "of device"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.kernel.replace("layernorm", "norm"),
            result.shape,
            result.format,
            str(result.rows),
            f"{result.seconds * 1e6:.1f}",
            f"{result.num_bytes / result.seconds / 1e9:.0f}",
            f"{result.num_ops / result.seconds / 1e12:.1f}",
            f"{result.limit(machine) / result.seconds:.0%}",
        )
    show_table(console, table, drop=("TFLOP/s", "GB/s"))
