"""`duetto roofline`: what a step takes, operation by operation, before it is run."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.core.engine_args import QuantizationName
from duetto.core.errors import ConfigError
from duetto.models.find import find_config, known_models
from duetto.models.programs import build_program
from duetto.planner.layout import DtypeName, KVName, Layout, with_weights
from duetto.pricing.cost_model import Deployment
from duetto.pricing.find_hardware import find_hardware
from duetto.pricing.gpus import ALIASES, HARDWARE
from duetto.pricing.picture import draw_roofline
from duetto.pricing.pyplot import pyplot_for
from duetto.pricing.roofline import Roofline, StepPrice
from duetto.pricing.roofline import roofline as price

MIN_SHARE = 0.001  # of a step's time; less is not a row of its own
_COLOURS = {"compute": "red", "memory": "blue", "interconnect": "magenta", "overhead": "yellow"}
_BOUNDS = {"interconnect": "link"}


def roofline(
    model: str | None = None,
    *,
    list_known: Annotated[bool, Parameter(name="--list", negative="")] = False,
    hardware: str = "host",
    tp: int = 1,
    pp: int = 1,
    batch: int = 1,
    context: int = 2048,
    chunk: int = 512,
    dtype: DtypeName = "auto",
    quantization: QuantizationName = "none",
    kv_dtype: Annotated[KVName, Parameter(name=("--kv-dtype", "--kv-cache-dtype"))] = "auto",
    micro_batches: int = 1,
    graphs: bool | None = None,
    datasheet: Annotated[bool, Parameter(negative="")] = False,
    picture: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Price prefill and decode of a model on some hardware. No weights are read.

    Parameters
    ----------
    model
        A checkpoint directory, a config.json, or a named shape like llama-3-8b.
    list_known
        Print the named shapes and the GPUs that are known, and end.
    hardware
        Like h100 or h100:8, host or gpu (after duetto calibrate), or a JSON file.
    tp
        Devices that share each layer.
    pp
        Stages that share the layers.
    batch
        Requests in the step.
    context
        Tokens of each request: all new in prefill, all in the cache in decode.
    chunk
        Tokens of a prompt in the step that mixes it with decode.
    dtype
        What weights are stored in; auto is what config.json says, or bfloat16.
    quantization
        The engine's own word for --dtype int8 and int4.
    kv_dtype
        What keys and values are stored in; auto is what the weights are, or were before they were
        quantized.
    micro_batches
        Parts in which a batch goes through the stages of --pp.
    graphs
        The host takes no time: steps are replayed as graphs and prepared ahead, as in engines of
        today. Assumed of GPUs; --no-graphs: the host takes what it did in vLLM of 2023.
    datasheet
        Take the vendor's peaks for what is reached, and leave out all overhead.
    picture
        Draw the operations under their roofs into this .png or .svg; needs matplotlib.
    as_json
        The last line of stdout is one JSON document.
    """
    if list_known:
        _print_known(as_json=as_json)
        return
    if model is None:
        raise ConfigError(
            "MODEL is missing: a checkpoint directory, a config.json, or one of --list"
        )
    if picture is not None:
        pyplot_for("--picture", picture)
    config = find_config(model)
    program, spec = build_program(config), find_hardware(hardware)
    if datasheet:
        spec = spec.ideal()
    layout = Layout(
        tp=tp,
        pp=pp,
        dtype=dtype,
        kv_cache_dtype=kv_dtype,
        graphs=graphs,
    )
    layout = with_weights(layout, config.dtype, quantization)
    deployment = replace(layout.on(spec, program), micro_batches=micro_batches)
    found = price(program, spec, deployment, batch=batch, context=context, chunk=chunk)
    if picture is not None:
        words = (
            f"{model}, {layout.weights} weights, on {spec.name}: batch {batch}, context {context}"
        )
        draw_roofline(found, deployment.arithmetic, picture, title=words)
    if as_json:
        about = {
            "model": model,
            "hardware": spec,
            "deployment": deployment,
            "batch": batch,
            "context": context,
            "chunk": chunk,
        }
        print_json({**about, **found.as_json()})
        return
    _print(found, deployment, picture)


def _print_known(*, as_json: bool) -> None:
    models, hardware = known_models(), tuple(HARDWARE)
    if as_json:
        print_json({"models": models, "hardware": hardware, "aliases": ALIASES})
        return
    console = open_console()
    say(console, "models: " + ", ".join(models))
    say(console, "hardware: " + ", ".join(hardware) + ", host and gpu (after duetto calibrate)")
    also = (f"{name} ({meant})" for name, meant in ALIASES.items())
    say(console, "also called: " + ", ".join(also))


def _print(found: Roofline, deployment: Deployment, picture: Path | None) -> None:
    console, spec = open_console(), found.hardware
    say(
        console,
        f"{spec.name}: {spec.peaks[deployment.arithmetic] / 1e12:.4g} TFLOP/s "
        f"({deployment.arithmetic}), {spec.memory_bandwidth / 1e9:.4g} GB/s, as of {spec.date}; "
        f"TP {deployment.tensor_parallel}, PP {deployment.pipeline_parallel}",
    )
    if deployment.graphs:
        say(console, "steps are replayed as graphs: the host takes no time (--no-graphs)")
    for name, step in found.steps.items():
        show_table(console, _table(name, step), drop=("FLOP/B", "GFLOP", "MB", "bound"))
    show_table(console, _sanity(found, deployment), wrap=(1, 0))
    for note in found.notes:
        say(console, f"note: {note}")
    if picture is not None:
        say(console, f"picture: {picture}")


def _table(name: str, step: StepPrice) -> Table:
    count, first = step.requests[0]
    words = f"{count} x {first.num_new} token{'s' * (first.num_new > 1)} after {first.num_past}"
    for _, chunk in step.requests[1:]:
        words = f"{count} x 1 token and a chunk of {chunk.num_new}"
    table = Table(
        title=f"\n{name}, {words}: [b]{step.time_s * 1e3:.4g} ms[/] "
        f"(datasheet {step.datasheet_time_s * 1e3:.4g} ms)",
        title_justify="left",
        box=None,
    )
    table.add_column("on one device")
    for heading in ("GFLOP", "MB", "FLOP/B", "ms", "share"):
        table.add_column(heading, justify="right")
    table.add_column("bound")
    small_s = 0.0
    for op in step.operations:
        share = op.time_s / step.time_s
        if share < MIN_SHARE:
            small_s += op.time_s
            continue
        calls = f" x{op.count:g}" if op.kind != "overhead" else ""
        table.add_row(
            op.name.replace("layernorm", "norm") + calls,
            _short(op.flops / 1e9),
            _short(op.bytes_moved / 1e6),
            _short(op.intensity),
            _short(op.time_s * 1e3),
            f"{share:.1%}",
            f"[{_COLOURS[op.bound]}]{_BOUNDS.get(op.bound, op.bound)}[/]",
        )
    if small_s:
        share = small_s / step.time_s
        table.add_row("the rest", "", "", "", _short(small_s * 1e3), f"{share:.1%}", "")
    return table


def _rule(step: StepPrice) -> str:
    by_rule, counted = step.flops_by_rule_of_thumb / 1e12, step.cost.flops / 1e12
    return f"{by_rule:.4g} TFLOP; {counted:.4g} counted"


def _short(number: float) -> str:
    """Three digits at least; nothing for nothing."""
    if not number:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _turning(batch: int | None) -> str:
    if batch is None:
        return "never"
    return "always" if batch == 1 else f"from {batch} requests on"


def _pipeline(found: Roofline, deployment: Deployment) -> list[tuple[str, str]]:
    """What a pipeline loses, beside what it would lose with equal stages."""
    stages, parts = deployment.pipeline_parallel, deployment.micro_batches
    if stages == 1:
        return []
    rule = f"(p - 1) / (m + p - 1) = {(stages - 1) / (parts + stages - 1):.1%} with equal stages"
    steps = found.steps.items()
    return [
        *((f"bubble of {name}", f"{step.bubble:.1%}; {rule}") for name, step in steps),
        *(
            (f"{name}, step after step", f"one every {_short(step.interval_s * 1e3)} ms")
            for name, step in steps
        ),
    ]


def _sanity(found: Roofline, deployment: Deployment) -> Table:
    sanity = found.sanity
    table = Table(title="\nto check by hand", title_justify="left", show_header=False, box=None)
    weights = ", ".join(f"{name} {size / 1e9:.4g}" for name, size in sanity.weight_bytes.items())
    for name, value in (
        ("parameters", f"{sanity.parameters:,} ({sanity.matrix_parameters:,} in products)"),
        ("2 · parameters", f"{sanity.flops_per_token / 1e9:.4g} GFLOP per token"),
        *((f"2 · n · params, {name}", _rule(step)) for name, step in found.steps.items()),
        ("KV", f"{sanity.kv_bytes_per_token:,} bytes per token"),
        ("weights, GB", weights),
        ("balance, datasheet", f"{sanity.balance_flops_per_byte:.4g} FLOP per byte"),
        ("matrix products of decode", "compute-bound"),
        ("  by the datasheet", _turning(sanity.datasheet_decode_turns_compute_bound_at)),
        ("  with what is reached", _turning(sanity.decode_turns_compute_bound_at)),
        *_pipeline(found, deployment),
    ):
        table.add_row(name, value)
    return table
