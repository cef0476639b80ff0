"""`duetto plan`: the cheapest way to serve a load within limits, found by simulation."""

from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from duetto.bench.metrics import JsonValue, parse_slo
from duetto.core.errors import ConfigError
from duetto.planner.hardware import find_hardware
from duetto.planner.layout import Layout, PrecisionName, make_fleet
from duetto.planner.load import LoadOptions
from duetto.planner.model import find_program
from duetto.planner.objective import Objective
from duetto.planner.search import Plan, Problem, Rate, Verdict, highest_rate, layouts, search
from duetto.progress import show_progress

Flat = Parameter(name="*")
Several = Parameter(consume_multiple=True, negative="")
SLICE = 500  # requests of the load that every layout is tried on


def plan(
    model: str,
    *,
    hardware: str,
    slo: Annotated[tuple[str, ...], Several],
    percentile: float = 99.0,
    budgets: Annotated[tuple[int, ...], Several] = (512, 1024, 2048, 4096),
    dtypes: Annotated[tuple[PrecisionName, ...], Several] = ("bfloat16",),
    disaggregate: bool = True,
    only_rate: Annotated[bool, Parameter(negative="")] = False,
    price: float | None = None,
    seed: int = 0,
    rows: int = 10,
    processes: int | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    base: Annotated[Layout | None, Flat] = None,
    load: Annotated[LoadOptions | None, Flat] = None,
) -> None:
    """Find the fewest devices, and how to use them, that serve a load within limits.

    Parameters
    ----------
    model
        A checkpoint directory, a config.json, or a named shape like llama-3.1-8b.
    hardware
        Like h100:8: up to so many devices are used.
    slo
        Limits like ttft=1,itl=0.05; of ttft, itl, tpot, e2e, in seconds or with a unit.
    percentile
        Of each latency, that must lie within its limit.
    budgets
        Tokens a step to try.
    dtypes
        Formats of the weights to try.
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
    spec, base = find_hardware(hardware), base or Layout()
    load = load or LoadOptions()
    workload = load.load(seed)
    if load.num_prompts is None and len(workload.arrivals) > SLICE:
        workload = workload.first(SLICE)
    problem = Problem(
        program=find_program(model, base.max_model_len),
        hardware=spec,
        workload=workload,
        objective=Objective(parse_slo(slo, unit="s"), percentile),
        price_per_hour=price,
    )
    if only_rate:
        rate = _rate(problem, base)
        _told(as_json, {"rate": _rate_json(rate)}, _rate_words(problem, base, rate))
        return
    candidates = _candidates(problem, base, budgets, dtypes, disaggregate=disaggregate)
    with show_progress("layouts", total=len(candidates)) as bar:
        found = search(problem, candidates, num_processes=processes, on_judged=bar.advance)
    rate = None if found.best is None else _rate(problem, found.best.layout)
    if as_json:
        print(msgspec.json.encode(_plan_json(found, rate)).decode(), flush=True)
    else:
        _print(problem, found, rate, rows)


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
        dtypes=dtypes,
        disaggregate=disaggregate,
    )


def _rate(problem: Problem, layout: Layout) -> Rate | None:
    fleet = make_fleet(problem.program, problem.hardware, layout)
    if not problem.workload.requests_per_s:
        return None
    with show_progress("rates") as bar:
        return highest_rate(problem, fleet, on_tried=lambda _rate, _is_met: bar.advance())


def _print(problem: Problem, found: Plan, rate: Rate | None, rows: int) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # whoever reads a file can scroll
    num_requests, own = len(problem.workload.arrivals), problem.workload.requests_per_s
    console.print(
        f"{len(found.verdicts)} layouts, {len(found.simulated)} of them simulated on "
        f"{num_requests} requests at {own:.2f}/s; latencies in ms, prefill+decode replicas"
    )
    if found.simulated:
        console.print(_table(problem, found.simulated[:rows]))
    for line in _conclusion(found):
        console.print(line, markup=False, highlight=False)
    for note in _notes(problem, found):
        console.print(f"note: {note}", markup=False, highlight=False)
    if found.best is not None:
        console.print(_rate_words(problem, found.best.layout, rate), markup=False, highlight=False)


def _notes(problem: Problem, found: Plan) -> tuple[str, ...]:
    if not found.simulated:
        return ()
    layout = found.simulated[0].layout
    return problem.hardware.notes_on_host(layout.deployment.arithmetic, layout.graphs)


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
            f"{verdict.ratio:.2f} {verdict.binding}",
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
            f"{smaller.ratio:.2f} times its limit"
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
        f"nearest: {_words(nearest)}; {nearest.binding} limits it, at {nearest.ratio:.2f} times "
        f"its limit",
    ]


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
    if rate.fails_at is None:
        return f"{words}, and no higher one was tried"
    return f"{words}; {rate.binding} binds, and {rate.fails_at:.2f} is too high"


def _told(as_json: bool, document: dict[str, JsonValue], words: str) -> None:
    if as_json:
        print(msgspec.json.encode(document).decode(), flush=True)
    else:
        Console().print(words, markup=False, highlight=False)


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
        "cost_per_million_output_tokens": verdict.cost_per_million,
        "reason": verdict.reason or None,
    }


def _rate_json(rate: Rate | None) -> JsonValue:
    return None if rate is None else msgspec.to_builtins(rate)
