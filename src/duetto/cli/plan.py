"""`duetto plan`: the cheapest way to serve a load within limits, found by simulation."""

import sys
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Table

from duetto.cli.draft import find_draft
from duetto.cli.output import Flat, JsonFlag, SloFlag, open_console, print_json, say, show_table
from duetto.core.engine_args import QuantizationName
from duetto.core.errors import ConfigError
from duetto.measure.metrics import JsonValue, parse_slo
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.planner.layout import Layout, PrecisionName, check_apart, check_used, with_weights
from duetto.planner.objective import Objective
from duetto.planner.rate import GAIN, THROUGHPUT, Rate, highest_rate
from duetto.planner.search import Plan, Problem, Verdict, layouts, search
from duetto.planner.speculation import notes_on_drafts
from duetto.pricing.find_hardware import find_hardware
from duetto.pricing.gpus import notes_on_host
from duetto.progress import show_progress
from duetto.simulation.load import TrafficOptions

Several = Parameter(consume_multiple=True, negative="")
SLICE = 500  # requests of the load that every layout is tried on
BUDGETS = (512, 1024, 2048, 4096)
# What a search tries by itself, and where to say which: a flag that it would ignore is refused.
_SEARCHED = {
    "tp": "",
    "pp": "",
    "replicas": "",
    "prefill_replicas": "; --no-disaggregate leaves it out",
    "max_num_batched_tokens": "; --budgets says which",
}


def plan(
    model: str,
    *,
    hardware: str,
    slo: SloFlag,
    percentile: float = 99.0,
    budgets: Annotated[tuple[int, ...], Several] = BUDGETS,
    dtypes: Annotated[tuple[PrecisionName, ...], Several] = (),
    quantization: QuantizationName = "none",
    disaggregate: bool = True,
    only_rate: Annotated[bool, Parameter(negative="")] = False,
    price: float | None = None,
    seed: int = 0,
    rows: int = 10,
    processes: int | None = None,
    as_json: JsonFlag = False,
    base: Annotated[Layout | None, Flat] = None,
    load: Annotated[TrafficOptions | None, Flat] = None,
) -> None:
    """Find the fewest devices, and how to use them, that serve a load within limits.

    Parameters
    ----------
    model
        A checkpoint directory, a config.json, or a named shape like llama-3.1-8b.
    hardware
        Like h100:8: up to so many devices are used.
    slo
        Limits, each with its unit, like ttft=1s,itl=50ms; of ttft, itl, tpot, e2e.
    percentile
        Of each latency, that must lie within its limit.
    budgets
        Tokens a step to try.
    dtypes
        Formats of the weights to try; by default the one of --dtype.
    quantization
        The engine's own word for --dtype int8 and int4.
    disaggregate
        Try prefill and decode on different replicas too.
    only_rate
        Search nothing: find the highest rate that the layout given by the flags sustains.
    price
        Of one device for an hour, in any currency.
    seed
        Of synthetic lengths and arrivals.
    rows
        How many layouts to show.
    processes
        How many to simulate at a time; by default one for each core.
    as_json
        The last line of stdout is one JSON document.
    """
    spec, base, load = find_hardware(hardware), base or Layout(), load or TrafficOptions()
    _check_numbers(rows, processes, price)
    config = find_config(model)
    is_searched = (budgets, dtypes, disaggregate) != (BUDGETS, (), True)
    _check_used(base, disaggregate, only_rate=only_rate, is_searched=is_searched)
    if dtypes and (base.dtype != "auto" or quantization != "none"):
        raise ConfigError("--dtypes with --dtype or --quantization: leave one of them out")
    base = with_weights(base, config.dtype, quantization)
    workload = load.load(seed)
    if load.num_prompts is None and len(workload.arrivals) > SLICE:
        workload = workload.first(SLICE)
    program = build_program(config, base.max_model_len)
    problem = Problem(
        program=program,
        hardware=spec,
        workload=workload,
        objective=Objective(parse_slo(slo), percentile),
        price_per_hour=price,
        draft=find_draft(base, program),
    )
    if only_rate:
        rate = _rate(problem, base)
        _show_rate(as_json, {"rate": _rate_json(rate)}, _rate_words(problem, base, rate))
        sys.exit(0 if rate else 1)
    candidates = _candidates(problem, base, budgets, dtypes, disaggregate=disaggregate)
    with show_progress("layouts", total=len(candidates)) as bar:
        found = search(problem, candidates, num_processes=processes, on_judged=bar.advance)
    rate = None if found.best is None else _rate(problem, found.best.layout)
    if as_json:
        print_json(_plan_json(found, rate))
    else:
        _print(problem, found, rate, rows)
    sys.exit(0 if found.best else 1)


def _check_numbers(rows: int, processes: int | None, price: float | None) -> None:
    for flag, count in (("--rows", rows), ("--processes", processes)):
        if count is not None and count < 1:
            raise ConfigError(f"{flag} {count}: must be 1 or more")
    if price is not None and not 0 < price < float("inf"):
        raise ConfigError(f"--price {price}: must be above 0")


def _check_used(base: Layout, disaggregate: bool, *, only_rate: bool, is_searched: bool) -> None:
    """Refuse what would be ignored."""
    if only_rate:
        check_used(base)
        if is_searched:
            raise ConfigError(
                "--only-rate with --budgets, --dtypes or --no-disaggregate: it searches nothing; "
                "--max-num-batched-tokens, --dtype and --prefill-replicas say what the layout is"
            )
        return
    plain = Layout()
    for name, instead in _SEARCHED.items():
        if getattr(base, name) != getattr(plain, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: is searched{instead}; it counts with --only-rate only"
            )
    if not disaggregate:
        check_apart(base)


def _candidates(
    problem: Problem,
    base: Layout,
    budgets: tuple[int, ...],
    dtypes: tuple[PrecisionName, ...],
    *,
    disaggregate: bool,
) -> list[Layout]:
    if problem.hardware.num_devices is None:
        name = problem.hardware.name
        raise ConfigError(f"--hardware {name}: say how many devices there may be, like {name}:8")
    return layouts(
        problem.program,
        problem.hardware.num_devices,
        base=base,
        budgets=budgets,
        dtypes=dtypes or (base.weights,),
        disaggregate=disaggregate,
    )


def _rate(problem: Problem, layout: Layout) -> Rate | None:
    fleet = problem.fleet(layout)
    if not problem.workload.requests_per_s:
        return None
    with show_progress("rates") as bar:
        return highest_rate(problem, fleet, on_tried=lambda _rate, _is_met: bar.advance())


def _print(problem: Problem, found: Plan, rate: Rate | None, rows: int) -> None:
    console = open_console()
    num_requests, own = len(problem.workload.arrivals), problem.workload.requests_per_s
    say(
        console,
        f"{len(found.verdicts)} layouts, {len(found.simulated)} of them simulated on "
        f"{num_requests} requests at {own:.2f}/s; latencies in ms, prefill+decode replicas\n"
        f"limits: {problem.objective.describe()}",
    )
    if found.simulated:
        show_table(console, _table(problem, found.simulated[:rows]), drop=("dtype", "cost/M"))
    for line in _conclusion(found):
        say(console, line)
    for note in _notes(problem, found, rate):
        say(console, f"note: {note}")
    if found.best is not None:
        say(console, _rate_words(problem, found.best.layout, rate))


def _notes(problem: Problem, found: Plan, rate: Rate | None) -> tuple[str, ...]:
    if not found.simulated:
        return ()
    layout, own = found.simulated[0].layout, problem.workload.requests_per_s
    deployment = layout.on(problem.hardware, problem.program)
    notes = notes_on_host(problem.hardware, deployment.arithmetic, deployment.graphs)
    notes += (
        f"a step has at most {layout.max_num_seqs} requests (--max-num-seqs), and prompts are cut "
        f"so that it does not hold up streams (--target-itl {layout.target_itl})",
    )
    notes += _draft_notes(layout, found.simulated[0])
    if found.best is not None and own and (rate is None or own > GAIN * rate.requests_per_s):
        notes += (
            f"{len(problem.workload.arrivals)} requests are too few to show a queue at {own:.2f}/s:"
            " what is best for them does not sustain that rate; raise --num-prompts",
        )
    return notes


def _draft_notes(layout: Layout, verdict: Verdict) -> tuple[str, ...]:
    notes = notes_on_drafts(layout)
    if notes and verdict.tokens_per_step is not None:
        notes = (f"{notes[0]}; the first layout has {verdict.tokens_per_step:.2f} tokens a step",)
    return notes


def _table(problem: Problem, verdicts: tuple[Verdict, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    shape = ("devices", "tp", "pp", "replicas", "tokens")
    for heading in (*shape, "dtype", *_names(problem), "of limit", "tok/s", "cost/M"):
        table.add_column(heading, justify="right")
    for verdict in verdicts:
        layout, cost = verdict.layout, verdict.cost_per_million
        split = f"{layout.prefill_replicas}+" if layout.prefill_replicas else ""
        table.add_row(
            str(layout.num_devices),
            str(layout.tp),
            str(layout.pp),
            f"{split}{layout.replicas}",
            str(layout.max_num_batched_tokens),
            layout.dtype,
            *(f"{seconds * 1000:.1f}" for seconds in (verdict.reached or {}).values()),
            f"{_of_limit(verdict)} {verdict.binding}",
            f"{verdict.throughput:.0f}",
            "-" if cost is None else f"{cost:.2f}",
        )
    return table


def _names(problem: Problem) -> list[str]:
    return [f"{name} p{problem.objective.percentile:g}" for name in problem.objective.limits]


def _conclusion(found: Plan) -> list[str]:
    """What is best, what comes next, and what binds."""
    best = found.best
    if best is None:
        return _nothing(found)
    lines = [f"best: {_words(best)}; {best.binding} binds, at {best.ratio:.0%} of its limit"]
    if found.runner_up is not None:
        lines.append(f"runner-up: {_words(found.runner_up)}")
    smaller = found.best_smaller
    if smaller is not None:
        lines.append(
            f"with fewer devices: {_words(smaller)} misses {smaller.binding}, at "
            f"{_of_limit(smaller)} times its limit"
        )
    else:
        reasons = _reasons(found, below=best.layout.num_devices)
        lines += [f"with fewer devices: {reasons}"] if reasons else []
    return lines


def _nothing(found: Plan) -> list[str]:
    if not found.simulated:
        reasons = list(dict.fromkeys(v.reason for v in found.verdicts))
        return ["no layout can be:", *(f"  {reason}" for reason in reasons[:5])]
    nearest = found.simulated[0]
    return [
        "nothing meets the limits",
        f"nearest: {_words(nearest)}; {nearest.binding} limits it, at {_of_limit(nearest)} times "
        f"its limit",
    ]


def _of_limit(verdict: Verdict) -> str:
    """To two digits; what misses its limit by a hair is 1.01 times it, not 1.00."""
    return f"{verdict.ratio if verdict.is_met else max(verdict.ratio, 1.01):.2f}"


def _reasons(found: Plan, below: int) -> str:
    """Why the first of the smaller layouts was not simulated."""
    smaller = [v for v in found.verdicts if v.reason and v.layout.num_devices < below]
    return smaller[0].reason if smaller else ""


def _words(verdict: Verdict) -> str:
    count = verdict.layout.num_devices
    return f"{count} device{'s' * (count > 1)}, {verdict.layout.describe()}"


def _rate_words(problem: Problem, layout: Layout, rate: Rate | None) -> str:
    if not problem.workload.requests_per_s:
        return "highest rate: the load arrives all at once, so it has none"
    if rate is None:
        return f"highest rate: {layout.describe()} does not meet the limits even unloaded"
    words = f"highest rate: {rate.requests_per_s:.2f} requests/s with {layout.describe()}"
    if rate.binding == THROUGHPUT:
        return f"{words}; {THROUGHPUT} binds: more are not answered in the time"
    return (
        f"{words}; {rate.binding} binds, {rate.fails_at:.2f} is too high, and no more than "
        f"{rate.throughput:.2f} are answered where all come at once"
    )


def _show_rate(as_json: bool, document: dict[str, JsonValue], words: str) -> None:
    if as_json:
        print_json(document)
    else:
        say(open_console(), words)


def _plan_json(found: Plan, rate: Rate | None) -> dict[str, JsonValue]:
    return {
        "best": None if found.best is None else _verdict_json(found.best),
        "runner_up": None if found.runner_up is None else _verdict_json(found.runner_up),
        "nearest": _verdict_json(found.simulated[0]) if _is_missed(found) else None,
        "rate": _rate_json(rate),
        "num_layouts": len(found.verdicts),
        "num_simulated": len(found.simulated),
        "layouts": [_verdict_json(verdict) for verdict in found.verdicts],
    }


def _is_missed(found: Plan) -> bool:
    """Nothing meets the limits, but something comes nearest."""
    return found.best is None and bool(found.simulated)


def _verdict_json(verdict: Verdict) -> dict[str, JsonValue]:
    return {
        "num_devices": verdict.layout.num_devices,
        "layout": msgspec.to_builtins(verdict.layout),
        "meets": verdict.is_met,
        "reached_s": verdict.reached,
        "binding": verdict.binding or None,
        "of_limit": verdict.ratio if verdict.reached is not None else None,
        "output_throughput": verdict.throughput,
        "tokens_per_step": verdict.tokens_per_step,
        "cost_per_million_output_tokens": verdict.cost_per_million,
        "reason": verdict.reason or None,
    }


def _rate_json(rate: Rate | None) -> JsonValue:
    return None if rate is None else msgspec.to_builtins(rate)
