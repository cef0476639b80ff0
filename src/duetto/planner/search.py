"""The cheapest layout that meets an objective on a workload, by simulation.

What cannot fit, or cannot be fast enough even for one request alone, is not simulated; nor is what
is dearer than the answer. Knows no cluster: every layout is judged by its own simulation.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import ceil
from multiprocessing.context import SpawnContext, SpawnProcess
from signal import (
    SIG_BLOCK,
    SIG_SETMASK,
    SIG_UNBLOCK,
    SIGINT,
    pthread_sigmask,
    signal,
    sigpending,
    sigwait,
)
from threading import current_thread, main_thread
from types import FrameType

from duetto.core.cpus import usable_cpus
from duetto.core.draft_counts import tokens_per_step
from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.metrics import Report
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout, PrecisionName
from duetto.planner.objective import Objective
from duetto.pricing.hardware import HardwareSpec
from duetto.program.program import Program
from duetto.program.rewrites.shard import possible_degrees
from duetto.simulation.report import Summary, sum_up
from duetto.simulation.simulation import Fleet, simulate
from duetto.simulation.workload import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to serve, on what, and how well. The same for every layout that is tried."""

    program: Program
    hardware: HardwareSpec
    workload: Traffic
    objective: Objective
    price_per_hour: float | None = None  # of one device
    draft: Program | None = None  # the draft model, where the layouts have one

    def fleet(self, layout: Layout) -> Fleet:
        """Raises ConfigError for a layout that cannot be."""
        return make_fleet(self.program, self.hardware, layout, self.draft)


MOST_LAYOUTS = 20_000  # of a search that ends
NUM_NEAREST = 4  # layouts to simulate where all are refused, so that the best of them is known


@dataclass(frozen=True, slots=True)
class Verdict:
    """One layout, judged. Without an outcome it was not simulated, and `reason` says why."""

    layout: Layout
    reached: dict[str, float] | None = None  # seconds, at the objective's percentile
    binding: str = ""  # the latency nearest to, or farthest beyond, its limit ...
    ratio: float = float("inf")  # ... and how many times the limit it is, or is at least
    throughput: float = 0.0  # output tokens/s
    cost_per_million: float | None = None
    reason: str = ""
    tokens_per_step: float | None = None  # of a simulation with drafts

    @property
    def is_met(self) -> bool:
        return self.ratio <= 1

    @property
    def place(self) -> tuple[bool, int, float]:
        """Sorts the best first: that meet the objective, fewest devices, most slack."""
        return not self.is_met, self.layout.num_devices if self.is_met else 0, self.ratio


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search found. `verdicts` are in order, best first, then those not simulated."""

    verdicts: tuple[Verdict, ...]

    @property
    def best(self) -> Verdict | None:
        return self.verdicts[0] if self.verdicts and self.verdicts[0].is_met else None

    @property
    def simulated(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.reached is not None)

    @property
    def runner_up(self) -> Verdict | None:
        """The next best that meets the objective."""
        return next((v for v in self.verdicts[1:] if v.is_met), None)

    @property
    def best_smaller(self) -> Verdict | None:
        """The best with fewer devices than the answer: what it lacks is why it takes so many."""
        best = self.best
        smaller = [
            v for v in self.simulated if best and v.layout.num_devices < best.layout.num_devices
        ]
        return min(smaller, key=lambda v: v.ratio, default=None)


def layouts(
    program: Program,
    num_devices: int,
    *,
    base: Layout,
    budgets: Sequence[int] = (512, 1024, 2048, 4096),
    dtypes: Sequence[PrecisionName] = ("bfloat16",),
    disaggregate: bool = True,
) -> list[Layout]:
    """Everything to try on up to `num_devices`: TP x PP x replicas x split x budget x precision.

    Raises ConfigError where that is more than a search should take.
    """
    degrees = [n for n in possible_degrees(program) if n <= num_devices]
    found: list[Layout] = []
    for tp, pp in product(degrees, (1, 2, 4, 8)):
        most = num_devices // (tp * pp)
        for total in range(1, most + 1) if pp <= len(program.kv) else ():
            for prefill in range(total if disaggregate else 1):
                if len(found) > MOST_LAYOUTS:
                    raise ConfigError(
                        f"--hardware: {num_devices} devices can be used in more than "
                        f"{MOST_LAYOUTS} ways; name fewer, or --no-disaggregate"
                    )
                for budget, dtype in product(budgets, dtypes):
                    found.append(
                        replace(
                            base,
                            tp=tp,
                            pp=pp,
                            replicas=total - prefill,
                            prefill_replicas=prefill,
                            max_num_batched_tokens=budget,
                            dtype=dtype,
                        )
                    )
    return found


def search(
    problem: Problem,
    candidates: Sequence[Layout],
    *,
    num_processes: int | None = None,
    on_judged: Callable[[int], None] = lambda _count: None,
) -> Plan:
    """Judge layouts, those with the fewest devices first, until a number of devices has met the
    objective; what would take more is dearer and left alone. Where all are refused without a
    simulation, those nearest to the limits are simulated. Uses all cores.

    `on_judged` is called with how many more have been judged. Raises ConfigError without layouts.
    """
    if not candidates:
        raise ConfigError("there is no layout to try: fewer devices than one replica needs")
    verdicts: list[Verdict] = []
    worth, hopeless = _sifted(problem, candidates)
    on_judged(len(hopeless))
    worth.sort(key=lambda v: v.layout.num_devices)
    with _workers(problem, num_processes, len(worth)) as pool:
        for num_devices, group in groupby(worth, key=lambda v: v.layout.num_devices):
            tried = [v.layout for v in group]
            if any(v.is_met for v in verdicts):
                reason = f"dearer than an answer: {num_devices} devices"
                hopeless += [Verdict(layout, reason=reason) for layout in tried]
                on_judged(len(tried))
                continue
            for verdict in pool.map(_judge_here, tried):
                verdicts.append(verdict)
                on_judged(1)
    return Plan((*sorted(verdicts, key=lambda v: v.place), *hopeless))


def _sifted(problem: Problem, candidates: Sequence[Layout]) -> tuple[list[Verdict], list[Verdict]]:
    """Which to simulate, and which not."""
    worth: list[Verdict] = []
    hopeless: list[Verdict] = []
    for layout in candidates:
        refused = why_not(problem, layout)
        (worth if refused is None else hopeless).append(refused or Verdict(layout))
    if worth:
        return worth, hopeless
    hopeless.sort(key=lambda v: v.ratio)
    count = sum(v.ratio < float("inf") for v in hopeless[:NUM_NEAREST])
    return hopeless[:count], hopeless[count:]


def why_not(problem: Problem, layout: Layout) -> Verdict | None:
    """Why a layout cannot be, or cannot meet the objective whatever the load; None if it may."""
    try:
        fleet = problem.fleet(layout)
    except ConfigError as error:
        return Verdict(layout, reason=str(error))
    limits, percentile = problem.objective.limits, problem.objective.percentile
    step_time = fleet.replica.step_time
    if "itl" in limits:
        alone = step_time(BatchShape((RequestShape(1, _shortest(problem.workload)),)))
        if alone > limits["itl"]:
            reason = f"itl: {alone * 1000:.1f} ms even for one request alone"
            return Verdict(layout, binding="itl", ratio=alone / limits["itl"], reason=reason)
    if "ttft" in limits:
        prompt = _prompt_to_compute(problem.workload, percentile)
        alone = _prefill_time(fleet, prompt)
        if alone > limits["ttft"]:
            reason = f"ttft: {alone:.2f} s for a prompt of {prompt} tokens alone"
            return Verdict(layout, binding="ttft", ratio=alone / limits["ttft"], reason=reason)
    return None


def judge(problem: Problem, layout: Layout) -> Verdict:
    """Simulate one layout. Raises ConfigError for one that cannot be."""
    fleet = problem.fleet(layout)
    outcome = run(problem, fleet, problem.workload)
    reached = problem.objective.reached(outcome.report)
    binding, ratio = problem.objective.binding(reached)
    return Verdict(
        layout,
        reached,
        binding,
        ratio,
        outcome.report.per_second(outcome.report.num_output_tokens),
        outcome.cost_per_million,
        tokens_per_step=_tokens_per_step(outcome.report),
    )


def _tokens_per_step(report: Report) -> float | None:
    num_accepted = report.drafts.total.num_accepted
    if not report.drafts.num_chains:
        return None
    return tokens_per_step(report.num_output_tokens, num_accepted)


def run(problem: Problem, fleet: Fleet, workload: Traffic) -> Summary:
    objective = problem.objective
    return sum_up(
        simulate(workload, fleet),
        fleet.num_devices,
        slo=objective.slo,
        percentiles=(50.0, objective.percentile),
        price_per_hour=problem.price_per_hour,
    )


def _shortest(workload: Traffic) -> int:
    return min(a.num_prompt_tokens for a in workload.arrivals)


def _prompt_to_compute(workload: Traffic, percentile: float) -> int:
    """A length that so many of the prompts exceed that the percentile of TTFT cannot be shorter
    than computing it alone. What an earlier prompt may have left in a cache does not count."""
    known: dict[tuple[int, int], int] = {}  # a node of a tree of prefixes and a hash id: the next
    lengths = []
    for arrival in workload.arrivals:
        num_before, node, num_shared = len(known), 0, 0
        for hash_id in arrival.hash_ids:
            node = known.setdefault((node, hash_id), len(known) + 1)
            num_shared += node <= num_before
        lengths.append(max(1, arrival.num_prompt_tokens - num_shared * workload.hash_block))
    lengths.sort()
    return lengths[int(percentile / 100 * (len(lengths) - 1))]


def _prefill_time(fleet: Fleet, num_tokens: int) -> float:
    """Seconds for a prompt that has a replica to itself."""
    config, step_time = fleet.replica.scheduler, fleet.replica.step_time
    budget = config.max_num_batched_tokens
    chunks = [min(budget, num_tokens - k * budget) for k in range(ceil(num_tokens / budget))]
    return sum(
        step_time(BatchShape((RequestShape(size, k * budget, int(k == len(chunks) - 1)),)))
        for k, size in enumerate(chunks)
    )


# --- all cores -------------------------------------------------------------------------------

_problem: Problem  # of a worker process; written once, when it starts


def _start_worker(problem: Problem) -> None:
    global _problem
    _problem = problem
    if SIGINT in sigpending():
        sigwait([SIGINT])  # it came while Python started: the parent has it too, and ends the work
    pthread_sigmask(SIG_UNBLOCK, [SIGINT])


def _judge_here(layout: Layout) -> Verdict:
    try:
        return judge(_problem, layout)
    except ConfigError as error:  # no request of the load has room, say
        return Verdict(layout, reason=str(error))


class _Worker(SpawnProcess):
    """A process that Ctrl-C does not interrupt while Python starts in it, which would print a
    traceback."""

    def start(self) -> None:
        with _later():
            before = pthread_sigmask(SIG_BLOCK, [SIGINT])  # what is blocked here is blocked there
            try:
                super().start()
            finally:
                pthread_sigmask(SIG_SETMASK, before)


@contextmanager
def _later() -> Iterator[None]:
    """Ctrl-C waits until the end of the block: a new process that its parent gave only half of its
    task would print a traceback.

    A mask is not enough: it holds for one thread, and any thread may take the signal.
    """
    if current_thread() is not main_thread():  # Python interrupts the main thread only
        yield
        return
    frames: list[FrameType | None] = []
    before = signal(SIGINT, lambda _, frame: frames.append(frame))
    try:
        yield
    finally:
        signal(SIGINT, before)
        if frames and callable(before):
            before(SIGINT, frames[0])


class _Workers(SpawnContext):
    """Fresh processes: a fork would copy threads' locks."""

    Process = _Worker


@contextmanager
def _workers(problem: Problem, num_processes: int | None, num_tasks: int) -> Iterator[Executor]:
    """A process for each core that may be used, and no more than there is work for."""
    count = num_processes or usable_cpus()
    with ProcessPoolExecutor(
        max(1, min(count, num_tasks)),
        mp_context=_Workers(),
        initializer=_start_worker,
        initargs=(problem,),
    ) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
