"""`duetto simulate`: the real scheduler on a load, in virtual time, on any hardware."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from duetto.cli.draft import find_draft
from duetto.cli.output import Flat, JsonFlag, SloFlag, open_console, print_json, say
from duetto.cli.report import print_parts, print_report
from duetto.core.engine_args import QuantizationName
from duetto.core.errors import ConfigError
from duetto.core.files import check_folder
from duetto.measure.metrics import parse_percentiles, parse_slo
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout, check_used, with_weights
from duetto.planner.speculation import notes_on_drafts
from duetto.pricing.find_hardware import find_hardware
from duetto.pricing.gpus import notes_on_host
from duetto.pricing.pyplot import pyplot_for
from duetto.program.reuse import reuse_limits
from duetto.progress import show_progress
from duetto.simulation.gantt import draw_gantt
from duetto.simulation.load import TrafficOptions
from duetto.simulation.perfetto import write_trace
from duetto.simulation.report import PoolUse, Summary, sum_up
from duetto.simulation.reuse import with_reuse
from duetto.simulation.simulation import simulate as run


def simulate(
    model: str,
    *,
    hardware: str,
    slo: SloFlag = (),
    price: float | None = None,
    seed: int = 0,
    metric_percentiles: str = "50,90,99",
    quantization: QuantizationName = "none",
    reuse: str | None = None,
    trace_out: Path | None = None,
    gantt: Path | None = None,
    as_json: JsonFlag = False,
    layout: Annotated[Layout | None, Flat] = None,
    load: Annotated[TrafficOptions | None, Flat] = None,
) -> None:
    """Run a load through the real scheduler, with a price instead of a computation.

    Parameters
    ----------
    model
        A checkpoint directory, a config.json, or a named shape like llama-3.1-8b. No weights are
        read.
    hardware
        Like h100 or h100:8, host or gpu (after duetto calibrate), or a JSON file.
    slo
        Limits for goodput, each with its unit, like ttft=1s,itl=50ms; of ttft, itl, tpot, e2e.
    price
        Of one device for an hour, in any currency: adds the cost of a million output tokens.
    seed
        Of synthetic lengths and arrivals.
    metric_percentiles
        Which percentiles to report.
    quantization
        The engine's own word for --dtype int8 and int4.
    reuse
        Documents' KV is reused wherever they stand, and which of their tokens are computed all the
        same: none, first:16, hkvd:0.15 or query:0.15. Documents are a trace's whole blocks with a
        hash id (mooncake), or those of --random-documents.
    trace_out
        Write every step and request to this file, which ui.perfetto.dev loads.
    gantt
        Draw the first requests and steps to this .png or .svg; needs matplotlib.
    as_json
        The last line of stdout is one JSON document.
    """
    limits = parse_slo(slo) if slo else None
    if price is not None and not 0 < price < float("inf"):
        raise ConfigError(f"--price {price}: must be above 0")
    wanted = parse_percentiles(metric_percentiles)
    if trace_out is not None:
        check_folder("--trace-out", trace_out)
    if gantt is not None:
        pyplot_for("--gantt", gantt)
    layout, load = layout or Layout(), load or TrafficOptions()
    check_used(layout)
    config, spec = find_config(model), find_hardware(hardware)
    program = build_program(config, layout.max_model_len)
    layout = with_weights(layout, config.dtype, quantization)
    fleet = make_fleet(program, spec, layout, find_draft(layout, program))
    workload = with_reuse(load.load(seed), reuse, reuse_limits(program))
    with show_progress("simulating", total=len(workload.arrivals)) as bar:
        simulation = run(workload, fleet, on_arrival=bar.advance)
    outcome = sum_up(
        simulation, fleet.num_devices, slo=limits, percentiles=wanted, price_per_hour=price
    )
    if trace_out is not None:
        write_trace(simulation, trace_out)
    if gantt is not None:
        draw_gantt(simulation, gantt, title=f"{model} on {layout.on_devices(spec)}")
    if as_json:
        about = {"model": model, "hardware": hardware, "layout": layout.describe(), "seed": seed}
        print_json(about | outcome.as_json())
    else:
        deployment = layout.on(spec, program)
        notes = (
            *outcome.notes,
            *notes_on_host(spec, deployment.arithmetic, deployment.graphs),
            *_notes_on_places(outcome, layout),
            *notes_on_drafts(layout),
        )
        _print(replace(outcome, notes=notes), layout.on_devices(spec))


def _notes_on_places(outcome: Summary, layout: Layout) -> tuple[str, ...]:
    """Where it is not the devices that requests wait for."""
    if not any(
        use.max_waiting and use.mean_running > 0.9 * layout.max_num_seqs * use.num_batches
        for use in outcome.pools.values()
    ):
        return ()
    return (
        f"requests waited for one of the {layout.max_num_seqs} places of a step; more of them "
        "(--max-num-seqs) may serve more",
    )


def _print(outcome: Summary, layout: str) -> None:
    console = open_console()
    say(console, layout)
    print_report(outcome.report, console, notes=outcome.notes)
    print_parts(outcome.parts_s, console)
    if outcome.reuse is not None:
        say(console, outcome.reuse.words)
    for line in () if outcome.tiers is None else outcome.tiers.words:
        say(console, line)
    for name, use in outcome.pools.items():
        say(console, f"{name}: {_use(use)}")
        if use.num_stages > 1:
            say(console, f"{name}: {_bubbles(use)}")
    if len(outcome.transfer):
        say(console, f"KV transfer delays a request by {outcome.transfer.mean() * 1000:.2f} ms")
    if outcome.cost_per_million is not None:
        say(console, f"{outcome.cost_per_million:.2f} for a million output tokens")


def _bubbles(use: PoolUse) -> str:
    return (
        f"bubbles {use.bubble:.1%} of the time of {use.num_stages} stages, with up to "
        f"{use.num_batches} batch{'es' * (use.num_batches > 1)} under way"
    )


def _use(use: PoolUse) -> str:
    words = (
        f"{use.num_replicas} replica{'s' * (use.num_replicas > 1)}, busy {use.busy:.0%}, "
        f"{use.num_steps} steps of {use.mean_tokens:.1f} tokens, {use.mean_running:.1f} running"
    )
    if use.kv_mean is not None and use.kv_max is not None:
        words += f", KV {use.kv_mean:.0%} used, {use.kv_max:.0%} at most"
    if use.max_waiting:
        words += f", up to {use.max_waiting} waiting"
    if use.num_preemptions:
        words += f", {use.num_preemptions} preemptions"
    return words
