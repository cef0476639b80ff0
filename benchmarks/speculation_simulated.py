"""What the simulator predicts of a run of speculation.py, from the prices of its steps."""

import statistics
from bisect import bisect_left
from collections.abc import Sequence

from duetto.core.config import SchedulerConfig
from duetto.core.shape import BatchShape, StepTime
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.simulation import Fleet, Served, simulate
from duetto.simulation.speculation import SimulatedDrafts
from duetto.simulation.workload import Arrival, Traffic

BETWEEN_ROUNDS_S = 1e5  # nothing is left of one when the next begins


def by_rows(num_rows: Sequence[int], seconds: Sequence[float]) -> StepTime:
    """A price of steps from those of some numbers of rows: straight between them, and beyond."""

    def price(shape: BatchShape) -> float:
        rows = max(shape.num_tokens, num_rows[0])
        place = min(max(1, bisect_left(num_rows, rows)), len(num_rows) - 1)
        slope = (seconds[place] - seconds[place - 1]) / (num_rows[place] - num_rows[place - 1])
        return max(seconds[0], seconds[place] + slope * (rows - num_rows[place]))

    return price


def predicted_speed(
    config: SchedulerConfig,
    step_time: StepTime,
    *,
    batch: int,
    num_prompt: int,
    num_output: int,
    accuracy: float,
    max_drafts: int,
    rounds: int = 12,
) -> float:
    """Times plain decoding, with the policy that ships: as measured, the median over rounds of the
    same requests, without the first."""
    arrivals = tuple(
        [
            Arrival(number * BETWEEN_ROUNDS_S, num_prompt, num_output)
            for number in range(rounds)
            for _ in range(batch)
        ]
    )
    drafts = SimulatedDrafts(method="recorded", max_drafts=max_drafts, acceptance=(accuracy,))
    rates = []
    for asked in (None, drafts):
        spec = ReplicaSpec(scheduler=config, step_time=step_time, drafts=asked)
        served = simulate(Traffic(arrivals), Fleet(replica=spec)).served
        groups = [served[i : i + batch] for i in range(batch, len(served), batch)]
        rates.append(statistics.median(map(_rate, groups)))
    return rates[1] / rates[0]


def _rate(served: Sequence[Served]) -> float:
    """Tokens per second while all of them decode."""
    times = [each.timings.token_times for each in served]
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    return sum(start < at <= end for each in times for at in each) / (end - start)
