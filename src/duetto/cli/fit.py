"""`duetto fit`: what a model takes of memory, and how many requests have room. Loads no weights."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from duetto.build import DEFAULT_BATCHED_TOKENS, EngineArgs, plan_options
from duetto.core.errors import ConfigError
from duetto.models.checkpoint import Checkpoint
from duetto.models.config import ModelConfig
from duetto.models.programs import build_program
from duetto.planner.hardware import HardwareSpec, find_hardware
from duetto.planner.layout import Layout
from duetto.planner.memory import MemoryFit, fit_device, num_requests
from duetto.planner.model import find_config
from duetto.planner.parallel import possible_degrees
from duetto.program.activations import activation_bytes
from duetto.program.program import Program
from duetto.runner.load import plan_model
from duetto.runner.loaders import LargestStep

HOST = "host"
_ENOUGH = 2**62  # bytes
_ONLY_HERE = ("backend", "threads", "kv_cache_memory_bytes", "packed_cache", "quantization_skip")
Report = dict[str, Any]


def fit(
    model: str,
    *,
    hardware: str = HOST,
    tp: int = 1,
    pp: int = 1,
    length: int | None = None,
    gpu_memory_utilization: float = 0.9,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Say whether a model fits, from its config.json alone (and its weights' headers, if there).

    Parameters
    ----------
    model
        A checkpoint directory, a config.json, or a named shape like llama-3.1-8b.
    hardware
        host (this machine, as `duetto serve` would use it), a name like h100, or a .json file.
    tp
        Devices that share each layer.
    pp
        Stages that share the layers.
    length
        Prompt and answer of a request, in tokens; by default the longest that is allowed.
    gpu_memory_utilization
        Part of a device's memory that may be used.
    json_output
        Print one JSON document instead.
    """
    report = examine(
        model,
        args or EngineArgs(),
        hardware,
        tp=tp,
        pp=pp,
        length=length,
        utilization=gpu_memory_utilization,
    )
    if json_output:
        print(msgspec.json.encode(report).decode())
    else:
        show(report, Console(highlight=False))
    sys.exit(0 if report["fits"] else 1)


def show_fit(model: str, args: EngineArgs) -> None:
    """What `duetto serve` would take of this machine. Raises ConfigError if it does not fit."""
    report = examine(model, args)
    show(report, Console(highlight=False))
    if not report["fits"]:
        raise ConfigError(f"{model} does not fit into this machine's memory")


def examine(
    model: str,
    args: EngineArgs,
    hardware: str = HOST,
    *,
    tp: int = 1,
    pp: int = 1,
    length: int | None = None,
    utilization: float = 0.9,
) -> Report:
    """All that `duetto fit` says. Raises ConfigError or CheckpointError for what cannot be."""
    config = find_config(model)
    program = build_program(config, args.asked_len)
    _check_headers(Path(model), program)
    if length is not None and not 1 <= length <= program.max_model_len:
        raise ConfigError(
            f"--length: must be from 1 to {program.max_model_len}, the longest that is allowed, "
            f"not {length}"
        )
    if hardware == HOST:
        if tp * pp != 1:
            raise ConfigError("--tp and --pp: this host is one device; name other --hardware")
        made = _on_host(config, program, args)
        knobs = _host_knobs(config, program, args, length)
    else:
        spec = find_hardware(hardware)
        layout = _layout(config, args, tp, pp, utilization)
        _check_devices(spec, layout)
        made = _on_devices(program, spec, layout)
        knobs = _device_knobs(program, spec, layout, length)
    found, longest, notes = made
    return {
        "model": model,
        "hardware": hardware,
        "devices": tp * pp,
        "parameters": program.num_parameters,
        "fits": found.num_blocks > 0,
        "max_model_len": longest,
        **asdict(found),
        "kv_bytes": found.kv_bytes,
        "left_bytes": found.left_bytes,
        "num_tokens": found.num_tokens,
        "length": length or longest,
        "num_requests": found.num_requests(length or longest) if longest else 0,
        "max_num_seqs": args.max_num_seqs,
        "notes": notes,
        "knobs": list(knobs),
    }


Made = tuple[MemoryFit, int, list[str]]  # the fit, the longest request, and what to tell


def _on_host(config: ModelConfig, program: Program, args: EngineArgs) -> Made:
    """As `duetto serve` would allocate on this machine, now."""
    options = plan_options(args)
    refusal: ConfigError | None = None
    try:
        plan = plan_model(config, program, may_shorten=args.asked_len is None, **options)
    except ConfigError as error:
        # What is too large is to be shown with its sizes; what cannot be at all is refused again.
        refusal, options["kv_cache_memory_bytes"] = error, _ENOUGH
        plan = plan_model(config, program, may_shorten=True, **options)
    step = LargestStep(
        num_tokens=_budget(args),
        num_logit_rows=args.max_num_seqs,
        max_model_len=plan.kv.max_model_len,
        num_kv_tokens=plan.kv.num_blocks * plan.block_size,
    )
    buffers = activation_bytes(program, step.num_tokens, step.num_logit_rows)
    fit = MemoryFit(
        memory_bytes=plan.available_bytes,
        usable_bytes=plan.available_bytes,
        weight_bytes=plan.loader.weight_bytes,
        activation_bytes=buffers + plan.loader.scratch_bytes(step, plan.kv_dtype),
        block_bytes=plan.kv.memory_bytes // plan.kv.num_blocks,
        block_size=plan.block_size,
        num_blocks=0 if refusal else plan.kv.num_blocks,
    )
    notes = [*plan.notes, *plan.loader.notes, *(() if refusal else plan.kv.notes)]
    notes.append(f"{plan.loader.name} backend, {plan.dtype} weights, {plan.kv_dtype} KV")
    if plan.quantization != "none":
        notes.append(f"quantization {plan.quantization}")
    if refusal:
        return fit, 0, [*notes, str(refusal)]
    return fit, plan.kv.max_model_len, notes


def _on_devices(program: Program, hardware: HardwareSpec, layout: Layout) -> Made:
    fit = fit_device(
        program,
        hardware,
        layout.deployment,
        block_size=layout.block_size,
        max_num_batched_tokens=layout.max_num_batched_tokens,
        max_num_seqs=layout.max_num_seqs,
        utilization=layout.gpu_memory_utilization,
    )
    notes = [f"{layout.dtype} weights; {layout.devices_per_replica} x {hardware.name}"]
    longest = min(program.max_model_len, fit.num_tokens)
    if not fit.num_blocks:
        notes.append(f"weights and activations alone are {-fit.left_bytes / 2**30:.1f} GiB more")
    elif longest < program.max_model_len:
        if layout.max_model_len is not None:
            fit = replace(fit, num_blocks=0)
        notes.append(f"a request of {program.max_model_len} tokens does not fit; {longest} do")
    return fit, longest, notes


def _check_headers(model: Path, program: Program) -> None:
    """What is wrong with a checkpoint is said now, and not when it is loaded."""
    if model.is_dir() and any(model.glob("*.safetensors")):
        with Checkpoint(model, program):
            pass


def _layout(config: ModelConfig, args: EngineArgs, tp: int, pp: int, utilization: float) -> Layout:
    """The flags of this host as those of a deployment elsewhere."""
    plain = EngineArgs()
    for name in _ONLY_HERE:
        if getattr(args, name) != getattr(plain, name):
            raise ConfigError(f"--{name.replace('_', '-')}: is for --hardware {HOST} only")
    dtype = config.dtype or "bfloat16" if args.dtype == "auto" else args.dtype
    return Layout(
        tp=tp,
        pp=pp,
        dtype=dtype if args.quantization == "none" else args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_batched_tokens=_budget(args),
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.asked_len,
        block_size=args.block_size,
        gpu_memory_utilization=utilization,
    )


def _check_devices(hardware: HardwareSpec, layout: Layout) -> None:
    have, need = hardware.num_devices, layout.devices_per_replica
    if have is not None and need > have:
        raise ConfigError(
            f"--tp {layout.tp} --pp {layout.pp}: needs {need} devices, and there are {have}"
        )


def _budget(args: EngineArgs) -> int:
    return args.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS


# --- what the knobs would change ---------------------------------------------------------------


def _host_knobs(
    config: ModelConfig, program: Program, args: EngineArgs, length: int | None
) -> Iterator[Report]:
    changes: list[tuple[str, EngineArgs]] = [
        (f"--quantization {name}", replace(args, quantization=name))
        for name in ("int8", "int4")
        if args.quantization != name
    ]
    if args.kv_cache_dtype != "int8":
        changes.append(("--kv-cache-dtype int8", replace(args, kv_cache_dtype="int8")))
    for words, changed in changes:
        try:
            fit, longest, _ = _on_host(config, program, changed)
        except ConfigError:  # not on this machine: no knob
            continue
        yield _knob(words, fit, length or longest)
    fit, longest, _ = _on_host(config, program, args)
    if not longest:
        return
    spare = max(0, fit.usable_bytes - fit.weight_bytes - fit.activation_bytes)
    more = replace(fit, num_blocks=spare // fit.block_bytes)
    yield _knob(f"--kv-cache-memory-bytes {more.kv_bytes} (all)", more, length or longest)
    yield _knob(f"requests of {longest // 2} tokens", fit, longest // 2)


def _device_knobs(
    program: Program, hardware: HardwareSpec, layout: Layout, length: int | None
) -> Iterator[Report]:
    changes: list[tuple[str, Layout]] = [
        ("--quantization int8", replace(layout, dtype="int8")),
        ("--quantization int4", replace(layout, dtype="int4")),
        ("--kv-cache-dtype int8", replace(layout, kv_cache_dtype="int8")),
        *_next_degree(program, hardware, layout),
        (f"--pp {2 * layout.pp}", replace(layout, pp=2 * layout.pp)),
    ]
    fit, longest, _ = _on_devices(program, hardware, layout)
    for words, changed in changes:
        try:
            other, its_longest, _ = _on_devices(program, hardware, changed)
        except ConfigError:  # degrees that this model does not have
            continue
        need, have = changed.devices_per_replica, hardware.num_devices
        if have is not None and need > have:
            if fit.num_blocks or not other.num_blocks:
                continue
            words += f" ({need} devices; there {'is' if have == 1 else 'are'} {have})"
        if changed != layout:
            yield _knob(words, other, length or its_longest)
    if longest > 1:
        yield _knob(f"requests of {longest // 2} tokens", fit, longest // 2)


def _next_degree(
    program: Program, hardware: HardwareSpec, layout: Layout
) -> list[tuple[str, Layout]]:
    """The next degree of tensor parallelism with which there is room for KV."""
    for degree in possible_degrees(program):
        wider = replace(layout, tp=degree)
        if degree > layout.tp and _on_devices(program, hardware, wider)[0].num_blocks:
            return [(f"--tp {degree}", wider)]
    return []


def _knob(words: str, fit: MemoryFit, length: int) -> Report:
    return {
        "change": words,
        "weight_bytes": fit.weight_bytes,
        "num_tokens": fit.num_tokens,
        "length": length,
        "num_requests": num_requests(fit.num_blocks, fit.block_size, length) if length else 0,
    }


# --- for people --------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """The report as a table."""
    where = "this machine" if report["hardware"] == HOST else f"each {report['hardware']}"
    verdict = "[green]fits[/]" if report["fits"] else "[red]does not fit[/]"
    console.print(f"{report['model']}: {report['parameters']:,} parameters, {verdict}")
    table = Table(show_header=False, box=None)
    usable = f"of {_size(report['memory_bytes'])}, {_size(report['usable_bytes'])} may be used"
    table.add_row("memory", usable, where)
    table.add_row("weights", _size(report["weight_bytes"]))
    table.add_row("activations", _size(report["activation_bytes"]), "of the largest step")
    table.add_row(
        "KV cache",
        _size(report["kv_bytes"]),
        f"{report['num_tokens']:,} tokens in blocks of {report['block_size']}, "
        f"{report['block_bytes'] / report['block_size'] / 1024:.1f} KiB each",
    )
    table.add_row("left", _size(report["left_bytes"]))
    fitting = min(report["num_requests"], report["max_num_seqs"])
    table.add_row(
        "requests",
        f"{fitting:,}",
        f"of {report['length']:,} tokens at one time (memory for {report['num_requests']:,}, "
        f"--max-num-seqs {report['max_num_seqs']})",
    )
    console.print(table)
    for note in report["notes"]:
        console.print(f"  note: {note}", markup=False)
    knobs = Table("what would change", "weights", "KV tokens", "requests", "of tokens", box=None)
    for knob in report["knobs"]:
        knobs.add_row(
            knob["change"],
            _size(knob["weight_bytes"]),
            f"{knob['num_tokens']:,}",
            f"{knob['num_requests']:,}",
            f"{knob['length']:,}",
        )
    console.print(knobs)


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / 2**30:.2f} GiB"
        if abs(num_bytes) >= 2**30
        else f"{num_bytes / 2**20:.1f} MiB"
    )
