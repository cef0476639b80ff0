"""`duetto bench schedulers`: static, continuous, chunked and disaggregated under one load, real and
simulated."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import isinf
from typing import Annotated

from rich.table import Table

from duetto import __version__
from duetto.build import Built, build, make_engine, served_config
from duetto.cli.default_model import model_or_demo
from duetto.cli.output import Flat, JsonFlag, SloFlag, open_console, print_json, say, show_table
from duetto.cluster.disaggregation.attach import LinkOptions, WithRole
from duetto.cluster.facts import WorkerRole
from duetto.core.cpus import usable_cpus
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.engine.handle import EngineOpener
from duetto.engine.thread import in_thread
from duetto.measure.arrivals import at_rate
from duetto.measure.metrics import SLO, JsonValue, Report, parse_slo, summarize
from duetto.measure.open_loop import (
    OpenedEngines,
    OpenLoopRun,
    check_same_answers,
    learn_steps,
    run_open_loop,
)
from duetto.measure.workload import Lengths, Workload, random_workload
from duetto.planner.schedulers import (
    APART,
    KINDS,
    PricedEngine,
    SchedulerKind,
    engine_args_of,
    fleet_of,
    traffic_of,
)
from duetto.pricing.learned import LearnedStepTime
from duetto.program.kv_size import bytes_per_block
from duetto.progress import show_progress
from duetto.simulation.disaggregation import KVLink
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import simulate
from duetto.worker_facts import engine_of_role, facts_of

_LATENCIES = ("ttft", "itl", "tpot", "e2e")
_WARM_UP = 8  # requests, from which steps' prices are learned too


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulersLoad:
    """One load for all of them. Lengths are lognormal, arrivals a Poisson process."""

    num_prompts: int = 40
    """Requests."""
    request_rate: float = 4.0
    """Requests per second; inf is all at once."""
    input_len: int = 256
    """Mean tokens per prompt."""
    output_len: int = 48
    """Mean tokens per answer."""
    length_spread: float = 0.8
    """Standard deviation of the logarithm of lengths; 0: all alike."""

    def workload(self, vocab_size: int, longest: int, seed: int) -> Workload:
        """Raises ConfigError, naming the flag."""
        most = longest // 2
        if max(self.input_len, self.output_len) > most:
            raise ConfigError(
                f"--input-len {self.input_len}, --output-len {self.output_len}: half of the "
                f"context each, {most} tokens, at most"
            )
        workload = random_workload(
            self.num_prompts,
            input_lengths=Lengths(self.input_len, "lognormal", self.length_spread, most),
            output_lengths=Lengths(self.output_len, "lognormal", self.length_spread, most),
            vocab_size=vocab_size,
            seed=seed,
        )
        return at_rate(workload, self.request_rate, seed=seed)


def schedulers(
    model: str | None = None,
    *,
    slo: SloFlag = ("ttft=500ms,tpot=50ms",),
    repetitions: int = 1,
    only_simulated: bool = False,
    kv_bandwidth: float = 4.0,
    max_local_prefill: int = 0,
    as_json: JsonFlag = False,
    load: Annotated[SchedulersLoad | None, Flat] = None,
    args: Annotated[EngineArgs | None, Flat] = None,
) -> None:
    """Serve one load by static, continuous, chunked and disaggregated scheduling, on engines of
    this process and in the simulator, with the prices that the real steps had.

    Each has the same cores: where there are two engines, each has half of --threads.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    slo
        Limits for goodput, each with its unit, like ttft=1s,itl=50ms; of ttft, itl, tpot, e2e.
    repetitions
        Runs of each on the real engines, in turns; their requests are summed up together.
    only_simulated
        Run the real engine only as long as its prices need.
    kv_bandwidth
        GB/s of the simulated link from prefill to decode.
    max_local_prefill
        Disaggregated: shorter prompts are computed where they are decoded.
    as_json
        The last line of stdout is one JSON document.
    """
    if repetitions < 1:
        raise ConfigError(f"--repetitions {repetitions}: must be 1 or more")
    if not 0 < kv_bandwidth < float("inf"):
        raise ConfigError(f"--kv-bandwidth {kv_bandwidth}: must be above 0")
    args, load = args or EngineArgs(), load or SchedulersLoad()
    if max_local_prefill < 0:
        raise ConfigError(f"--max-local-prefill {max_local_prefill}: must be 0 or more")
    limits = parse_slo(slo)
    bench = SchedulersBench(
        model_or_demo(model), args, load, limits, kv_bandwidth, max_local_prefill
    )
    real: dict[str, Report] = {}
    kinds = [] if only_simulated else list(KINDS)
    with show_progress("runs", total=len(kinds) * repetitions) as bar:
        runs: dict[str, list[OpenLoopRun]] = {kind.name: [] for kind in kinds}
        bench.learn()
        for number in range(repetitions):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                runs[kind.name].append(bench.run(kind))
                bar.advance()
        check_same_answers([run for own in runs.values() for run in own])
        real = {name: bench.report(own) for name, own in runs.items()}
    simulated = {kind.name: bench.simulated(kind) for kind in KINDS}
    if as_json:
        print_json(bench.about() | {"real": _json(real), "simulated": _json(simulated)})
    else:
        _print(bench, real, simulated)


@dataclass(slots=True)
class SchedulersBench:
    """Engines of one model, with all threads or with half of them, and what their steps take."""

    model: str
    args: EngineArgs
    load: SchedulersLoad
    slo: SLO
    kv_bandwidth: float
    max_local_prefill: int
    _built: dict[int, list[Built]] = field(default_factory=dict)  # by how many share the threads
    _times: dict[int, LearnedStepTime] = field(default_factory=dict)
    _workload: Workload | None = None

    @property
    def threads(self) -> int:
        return self.args.threads or usable_cpus()

    @property
    def workload(self) -> Workload:
        if self._workload is None:
            built = self._engines(1)[0]
            longest = built.scheduler_config.max_model_len
            self._workload = self.load.workload(
                built.codec.vocab_size, longest, self.args.seed or 0
            )
        return self._workload

    def learn(self) -> None:
        """Warm up, and learn what steps take with all threads and with half of them."""
        first = Workload(self.workload.requests[:_WARM_UP])
        for count in (1, 2):
            (built, *_) = self._engines(count)
            times = LearnedStepTime(built.prices.step_time)
            for kind in KINDS[:3]:
                engines = OpenedEngines([self._opener(built, kind)])
                learn_steps(times, run_open_loop(engines, first).steps[0])
            self._times[count] = times

    def run(self, kind: SchedulerKind) -> OpenLoopRun:
        built = self._engines(kind.num_engines)
        if kind.is_apart:
            run = self._run_apart(*built)
        else:
            openers = [self._opener(each, kind) for each in built]
            run = run_open_loop(OpenedEngines(openers), self.workload)
        for steps in run.steps:
            learn_steps(self._times[kind.num_engines], steps)
        return run

    def _run_apart(self, decode: Built, prefill: Built) -> OpenLoopRun:
        """Two engines with a role each, and the KV link between them that workers have."""
        with ExitStack() as stack:
            computes = self._with_role(prefill, "prefill", stack)
            answers = self._with_role(decode, "decode", stack)
            engines = OpenedEngines(
                [answers.open_engine], [computes.open_engine], (computes.facts.link,)
            )
            return run_open_loop(engines, self.workload)

    def _with_role(self, built: Built, role: WorkerRole, stack: ExitStack) -> WithRole:
        config = served_config(built.model, engine_args_of(APART, self.args))
        fresh = replace(built, engine=make_engine(built.model, config, built.prices.step_time))
        facts = facts_of(fresh, __version__, role)
        made = engine_of_role(fresh, facts, self.max_local_prefill, LinkOptions())
        stack.callback(made.close)
        return made

    def report(self, runs: Sequence[OpenLoopRun]) -> Report:
        """Of all runs together."""
        records = [record for run in runs for record in run.records]
        return summarize(records, sum(run.duration_s for run in runs), slo=self.slo)

    def simulated(self, kind: SchedulerKind) -> Report:
        built = self._engines(kind.num_engines)[0]
        config = served_config(built.model, engine_args_of(kind, self.args))
        engine = PricedEngine(config, self._times[kind.num_engines].step_time)
        program = built.model.program
        link = KVLink(
            num_layers=len(program.kv),
            bytes_per_token=bytes_per_block(program, 1, built.model.kv_dtype),
            bytes_per_s=self.kv_bandwidth * 1e9,
        )
        fleet = fleet_of(kind, engine, link, self.max_local_prefill)
        outcome = simulate(traffic_of(self.workload), fleet)
        return sum_up(outcome, fleet.num_devices, slo=self.slo).report

    def about(self) -> dict[str, JsonValue]:
        rate = self.load.request_rate
        return {
            "model": self._engines(1)[0].name,
            "threads": self.threads,
            "num_prompts": self.load.num_prompts,
            "request_rate": "inf" if isinf(rate) else rate,
            "input_len": self.load.input_len,
            "output_len": self.load.output_len,
            "length_spread": self.load.length_spread,
            "kv_bandwidth": self.kv_bandwidth,
            "max_local_prefill": self.max_local_prefill,
            "slo_ms": self.slo.as_ms(),
        }

    def _opener(self, built: Built, kind: SchedulerKind) -> EngineOpener:
        config = served_config(built.model, engine_args_of(kind, self.args))
        return in_thread(make_engine(built.model, config, built.prices.step_time))

    def _engines(self, count: int) -> list[Built]:
        """So many, each with its part of the threads; the model is loaded for each."""
        if count not in self._built:
            args = replace(self.args, threads=max(1, self.threads // count))
            self._built[count] = [build(self.model, args) for _ in range(count)]
        return self._built[count]


# --- shown -------------------------------------------------------------------------------------


def _json(reports: dict[str, Report]) -> dict[str, JsonValue]:
    return {name: report.as_json() for name, report in reports.items()}


def _print(bench: SchedulersBench, real: dict[str, Report], simulated: dict[str, Report]) -> None:
    console, load = open_console(), bench.load
    limits = ", ".join(f"{name} {ms:g} ms" for name, ms in bench.slo.as_ms().items())
    say(
        console,
        f"{load.num_prompts} requests at {load.request_rate:g}/s, prompts of {load.input_len} "
        f"tokens and answers of {load.output_len} on average; {bench.threads} threads; latencies "
        f"in ms, p50 / p99; good: {limits}",
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("", "", *map(str.upper, _LATENCIES), "tok/s", "good/s", "good"):
        table.add_column(heading, justify="right")
    table.columns[0].justify = table.columns[1].justify = "left"
    for kind in KINDS:
        for where, reports in (("real", real), ("simulated", simulated)):
            if kind.name in reports:
                table.add_row(kind.name, where, *_cells(reports[kind.name]))
    show_table(console, table)


def _cells(report: Report) -> list[str]:
    cells = []
    for name in _LATENCIES:
        percentiles = getattr(report, name).percentiles
        cells.append(f"{_ms(percentiles[50.0])} / {_ms(percentiles[99.0])}")
    good = report.num_good or 0
    return [
        *cells,
        f"{report.per_second(report.num_output_tokens):.0f}",
        f"{report.per_second(good):.2f}",
        f"{good / report.num_requests:.0%}",
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"
