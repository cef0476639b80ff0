"""`duetto fit`: what a model takes of memory, and how many requests have room. Loads no weights."""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from duetto.build import EngineArgs, plan_options
from duetto.checkpoints.checkpoint import Checkpoint
from duetto.checkpoints.config import ModelConfig
from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.core.config import SchedulerConfig, batched_tokens, itl_target
from duetto.core.errors import ConfigError
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.planner.layout import Layout
from duetto.pricing.cost_model import check_devices
from duetto.pricing.find_hardware import HOST, find_hardware
from duetto.pricing.hardware import HardwareSpec
from duetto.pricing.memory import MemoryFit, fit_device
from duetto.pricing.parallel import possible_degrees
from duetto.program.activations import activation_bytes
from duetto.program.program import Program
from duetto.runner.load import ModelPlan, plan_model
from duetto.runner.loaders import LargestStep

_ENOUGH = 2**62  # bytes
_ONLY_HERE = ("backend", "threads", "kv_cache_memory_bytes", "packed_cache", "quantization_skip")
Report = dict[str, Any]


def fit(
    model: str,
    *,
    hardware: str = HOST,
    tp: int | None = None,
    pp: int = 1,
    length: int | None = None,
    gpu_memory_utilization: float = 0.9,
    json_output: JsonFlag = False,
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
        Devices that share each layer; by default the fewest of those there are with which it fits.
    pp
        Stages that share the layers.
    length
        Prompt and answer of a request, in tokens; by default the longest that is allowed.
    gpu_memory_utilization
        Part of a device's memory that may be used.
    json_output
        The last line of stdout is one JSON document.
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
        print_json(report)
    else:
        show(report, open_console())
    sys.exit(0 if report["fits"] else 1)


def show_fit(model: str, args: EngineArgs, *, as_json: bool) -> None:
    """What `duetto serve` would take of this machine. Raises ConfigError if it does not fit."""
    report = examine(model, args)
    if as_json:
        print_json(report)
    else:
        show(report, open_console())
    if not report["fits"]:
        raise ConfigError(f"{model} does not fit into this machine's memory")


def examine(
    model: str,
    args: EngineArgs,
    hardware: str = HOST,
    *,
    tp: int | None = None,
    pp: int = 1,
    length: int | None = None,
    utilization: float = 0.9,
) -> Report:
    """All that `duetto fit` says. Raises ConfigError or CheckpointError for what cannot be."""
    if args.revision is not None:
        raise ConfigError("--revision: is for models on the hub, and what fits is told of others")
    config = find_config(model)
    program = build_program(config, args.asked_len)
    _check_headers(Path(model), program)
    if length is not None and not 1 <= length <= program.max_model_len:
        raise ConfigError(
            f"--length: must be from 1 to {program.max_model_len}, the longest that is allowed, "
            f"not {length}"
        )
    if hardware == HOST:
        if (tp, pp) not in ((None, 1), (1, 1)):
            raise ConfigError("--tp and --pp: this host is one device; name other --hardware")
        tp, made = 1, _on_host(config, program, args)
        knobs = _host_knobs(config, program, args, length)
    else:
        spec = find_hardware(hardware)
        layout = _layout(config, args, 1 if tp is None else tp, pp, utilization)
        if tp is None:
            layout = _least_degree(program, spec, layout)
        check_devices(spec, layout.deployment)
        tp, made = layout.tp, _on_devices(program, spec, layout)
        knobs = _device_knobs(program, spec, layout, length)
    found, longest, notes = made
    return {
        "model": model,
        "hardware": hardware,
        "devices": tp * pp,
        "parameters": program.num_parameters,
        "fits": found.fits,
        "tp": tp,
        "max_model_len": longest,
        **asdict(found),
        "kv_bytes": found.kv_bytes,
        "left_bytes": found.left_bytes,
        "num_tokens": found.num_tokens,
        "length": length or longest,
        "num_requests": found.num_requests(length or longest) if longest and found.fits else 0,
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
    step = _largest_step(args, plan)
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
    if not fit.fits:
        notes.append(
            f"weights, activations and KV together are {_size(-fit.left_bytes)} more than the "
            f"{_size(fit.usable_bytes)} that may be used"
        )
    return fit, plan.kv.max_model_len, notes


def _largest_step(args: EngineArgs, plan: ModelPlan) -> LargestStep:
    """No token without a slot for its KV, and no logits without a token. Raises ConfigError where
    a scheduler would, as at a start."""
    target = itl_target(args.target_itl, enable_chunked_prefill=args.enable_chunked_prefill)
    config = SchedulerConfig(
        num_blocks=plan.kv.num_blocks,
        max_model_len=plan.kv.max_model_len,
        block_size=plan.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=_budget(args, plan.kv.max_model_len),
        enable_chunked_prefill=args.enable_chunked_prefill,
        target_itl_s=target.seconds,
        target_itl_steps=target.steps,
    )
    slots = config.num_blocks * config.block_size
    num_tokens = min(config.max_num_batched_tokens, slots)
    return LargestStep(
        num_tokens=num_tokens,
        num_logit_rows=min(config.max_num_seqs, num_tokens),
        max_model_len=config.max_model_len,
        num_kv_tokens=slots,
    )


def _on_devices(program: Program, hardware: HardwareSpec, layout: Layout) -> Made:
    fit = fit_device(
        program,
        hardware,
        layout.on(hardware),
        block_size=layout.block_size,
        max_num_batched_tokens=layout.max_num_batched_tokens,
        max_num_seqs=layout.max_num_seqs,
        utilization=layout.gpu_memory_utilization,
    )
    notes = [f"{layout.weights} weights; {layout.devices_per_replica} x {hardware.name}"]
    longest = min(program.max_model_len, fit.num_tokens)
    if not fit.num_blocks:
        notes.append(
            f"weights and activations alone are {_size(-fit.left_bytes)} more than the "
            f"{_size(fit.usable_bytes)} of each that may be used"
        )
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
        max_num_batched_tokens=_budget(args, args.asked_len or config.context_length),
        enable_chunked_prefill=args.enable_chunked_prefill,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.asked_len,
        block_size=args.block_size,
        gpu_memory_utilization=utilization,
    )


def _least_degree(program: Program, hardware: HardwareSpec, layout: Layout) -> Layout:
    """With the fewest of the devices that there are, for the longest request or else for any; with
    all of them where none would do."""
    most = (hardware.num_devices or 1) // layout.pp if hardware.link_bandwidth else 1
    tried = [replace(layout, tp=n) for n in possible_degrees(program) if n <= most] or [layout]
    fits = [_on_devices(program, hardware, each) for each in tried]
    for least in (program.max_model_len, 1):
        for each, (fit, longest, _) in zip(tried, fits, strict=True):
            if fit.fits and longest >= least:
                return each
    return tried[-1]


def _budget(args: EngineArgs, max_model_len: int) -> int:
    """As at a start: without chunking, a whole context goes into one step."""
    return batched_tokens(
        args.max_num_batched_tokens,
        enable_chunked_prefill=args.enable_chunked_prefill,
        max_model_len=max_model_len,
    )


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
            check_devices(replace(hardware, num_devices=None), changed.deployment)
        except ConfigError:  # degrees that this model does not have, or devices without a link
            continue
        need, have = changed.devices_per_replica, hardware.num_devices
        if have is not None and need > have:
            if fit.fits or not other.fits:
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
        if degree > layout.tp and _on_devices(program, hardware, wider)[0].fits:
            return [(f"--tp {degree}", wider)]
    return []


def _knob(words: str, fit: MemoryFit, length: int) -> Report:
    return {
        "change": words,
        "weight_bytes": fit.weight_bytes,
        "num_tokens": fit.num_tokens,
        "length": length,
        "num_requests": fit.num_requests(length) if length and fit.fits else 0,
    }


# --- for people --------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """The report as a table."""
    name = re.sub(r":[0-9]+$", "", report["hardware"])  # without how many there are
    where = "this machine" if report["hardware"] == HOST else f"each {name}"
    verdict = "[green]fits[/]" if report["fits"] else "[red]does not fit[/]"
    if report["tp"] > 1:
        verdict += f" with --tp {report['tp']}"
    name = escape(report["model"])
    say(console, f"{name}: {report['parameters']:,} parameters, {verdict}", markup=True)
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
    show_table(console, table, wrap=(2, 1))
    for note in report["notes"]:
        say(console, f"  note: {note}")
    columns = ("weights", "KV tokens", "requests", "memory for", "of tokens")
    knobs = Table("what would change", *columns, box=None)
    for knob in report["knobs"]:
        knobs.add_row(
            knob["change"],
            _size(knob["weight_bytes"]),
            f"{knob['num_tokens']:,}",
            f"{min(knob['num_requests'], report['max_num_seqs']):,}",
            f"{knob['num_requests']:,}",
            f"{knob['length']:,}",
        )
    show_table(console, knobs, drop=("of tokens", "weights"), wrap=(0,))


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if abs(gib) >= 1 else f"{gib * 1024:.1f} MiB"
