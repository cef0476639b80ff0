"""The highest rate that a fleet sustains within limits, by simulation.

A rate is sustained for ever or not at all, so loads are repeated until a queue would show. Knows no
layouts and no search for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from duetto.core.errors import ConfigError
from duetto.planner.search import Problem, run
from duetto.simulation.simulation import Fleet
from duetto.simulation.workload import Traffic

THROUGHPUT = "throughput"  # what binds where latencies do not
LEAST_REQUESTS = 1000  # of a run that is to show a 99th percentile
MOST_REQUESTS = 5000  # of one that is to show a queue
SPANS = 10  # times its requests' mean latency that a run lasts, so that its start counts for little
LOWEST = 1 / 1024  # of the throughput; no lower rate is tried ...
SLOWER = 8  # ... and so many times slower is what is tried next
GAIN = 1.03  # of throughput by a load twice as long, below which it is long enough


@dataclass(frozen=True, slots=True)
class Rate:
    """The highest rate found, in requests/s, and what binds there."""

    requests_per_s: float
    binding: str  # a latency, or "throughput"
    reached: dict[str, float]
    fails_at: float | None  # the lowest rate that was tried and is too high; None: none was
    throughput: float  # requests/s where all come at once: no higher rate was tried


def highest_rate(
    problem: Problem,
    fleet: Fleet,
    *,
    tolerance: float = 0.02,
    on_tried: Callable[[float, bool], None] = lambda _rate, _is_met: None,
) -> Rate | None:
    """The highest rate at which the objective is met: the workload sped up or slowed down, by
    bisection to within `tolerance`, and never above what is answered where nothing is waited for.
    None if a thousandth of that is too high. A workload that arrives all at once has no rate:
    ConfigError.
    """
    if not problem.workload.requests_per_s:
        raise ConfigError("the highest rate needs a workload with times of its own")
    throughput = _throughput(problem, fleet)
    met: dict[float, dict[str, float]] = {}

    def is_met(rate: float) -> bool:
        reached = reached_at(problem, fleet, rate)
        good = problem.objective.binding(reached)[1] <= 1
        if good:
            met[rate] = reached
        on_tried(rate, good)
        return good

    if is_met(throughput):
        return Rate(throughput, THROUGHPUT, met[throughput], None, throughput)
    low, high = throughput / 2, throughput
    while not is_met(low):
        low, high = low / SLOWER, low
        if low < LOWEST * throughput:
            return None
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return Rate(low, problem.objective.binding(met[low])[0], met[low], high, throughput)


def reached_at(problem: Problem, fleet: Fleet, rate: float) -> dict[str, float]:
    """The latencies of the objective at a rate, in seconds, of a run that is long enough to show
    whether a queue grows; or of a shorter one that misses a limit already."""
    load = _at_least(problem.workload, LEAST_REQUESTS)
    while True:
        outcome = run(problem, fleet, load.faster(rate / load.requests_per_s))
        reached = problem.objective.reached(outcome.report)
        needed = ceil(SPANS * (outcome.report.e2e.mean or 0.0) * rate)
        num_requests = len(load.arrivals)
        is_long_enough = num_requests >= min(needed, MOST_REQUESTS)
        if is_long_enough or problem.objective.binding(reached)[1] > 1:
            return reached
        load = _at_least(problem.workload, min(max(needed, 2 * num_requests), MOST_REQUESTS))


def _throughput(problem: Problem, fleet: Fleet) -> float:
    """Requests/s where all come at once, of a load so long that how it ends counts for little."""
    found, num_requests = 0.0, LEAST_REQUESTS
    while True:
        load = _at_least(problem.workload, num_requests)
        report = run(problem, fleet, load.at([0.0] * len(load.arrivals))).report
        last, found = found, max(found, report.per_second(report.num_ok))
        if found <= GAIN * last or len(load.arrivals) >= MOST_REQUESTS:
            return found
        num_requests = 2 * len(load.arrivals)


def _at_least(workload: Traffic, num_requests: int) -> Traffic:
    return workload.repeated(max(1, ceil(num_requests / len(workload.arrivals))))
