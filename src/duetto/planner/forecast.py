"""What a layout would give a measured load: `duetto plan`'s fleet, with steps as slow as measured.

Knows no history and decides nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from duetto.core.errors import ConfigError
from duetto.measure.metrics import SLO
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout
from duetto.planner.resampled import MeasuredLoad
from duetto.pricing.hardware import HardwareSpec
from duetto.program.program import Program
from duetto.simulation.pipeline import Passage
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import Fleet, Simulation, simulate

FEWEST, MOST = 60, 400  # requests of a simulation


class RoleCounts(NamedTuple):
    """How many workers there are, or should be: those that answer, and those that only compute
    prompts for them."""

    replicas: int
    prefill: int = 0

    def __str__(self) -> str:
        words = f"{self.replicas} replica{'s' * (self.replicas != 1)}"
        return f"{self.prefill} prefill + {words}" if self.prefill else words

    @property
    def total(self) -> int:
        return self.replicas + self.prefill


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a layout is expected to give; `within` is the lesser of the parts of requests whose TTFT
    and whose TPOT keep their limits."""

    counts: RoleCounts
    within: float
    ttft_p50_s: float = 0.0
    ttft_p99_s: float = 0.0
    tpot_mean_s: float | None = None  # over requests, as the server's histogram has it
    refusal: str = ""  # why it cannot be

    def __str__(self) -> str:
        if self.refusal:
            return f"{self.counts}: cannot be: {self.refusal}"
        tpot = "" if self.tpot_mean_s is None else f", TPOT {self.tpot_mean_s * 1000:.1f} ms"
        return (
            f"{self.counts}: {self.within:.1%} within the limits (TTFT p50 "
            f"{self.ttft_p50_s * 1000:.0f} ms, p99 {self.ttft_p99_s * 1000:.0f} ms{tpot})"
        )


class Forecaster(Protocol):
    """The model of a cluster."""

    def forecast(self, counts: RoleCounts, load: MeasuredLoad, slowdown: float) -> Forecast:
        """`slowdown`: how many times their price steps take."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetForecaster:
    """By simulation of the next `horizon_s` seconds."""

    program: Program
    hardware: HardwareSpec
    base: Layout  # all but the number of replicas
    limits: SLO
    horizon_s: float = 60.0
    draft: Program | None = None

    def forecast(self, counts: RoleCounts, load: MeasuredLoad, slowdown: float) -> Forecast:
        layout = replace(self.base, replicas=counts.replicas, prefill_replicas=counts.prefill)
        try:
            fleet = slower(make_fleet(self.program, self.hardware, layout, self.draft), slowdown)
            config = fleet.replica.scheduler
            num_requests = round(min(max(load.rate * self.horizon_s, FEWEST), MOST))
            traffic = load.traffic(
                num_requests, block=config.block_size, longest=config.max_model_len
            )
            simulation = simulate(traffic, fleet)
            report = sum_up(simulation, fleet.num_devices, percentiles=(50.0, 99.0)).report
        except ConfigError as error:
            return Forecast(counts, 0.0, refusal=str(error))
        return Forecast(
            counts,
            self._within(simulation),
            report.ttft.median or 0.0,
            report.ttft.percentiles[99.0] or 0.0,
            report.tpot.mean,
        )

    def _within(self, simulation: Simulation) -> float:
        """A refused request is within no limit."""
        done = [s.timings for s in simulation.served if s.refusal is None]
        ttfts = [t.token_times[0] - t.arrival_time for t in done]
        tpots = [t.tpot_s for t in done if t.tpot_s is not None]
        refused = len(simulation.served) - len(done)
        return min(
            _share(ttfts, self.limits.ttft, refused), _share(tpots, self.limits.tpot, refused)
        )


def _share(values: Sequence[float], limit: float | None, num_refused: int) -> float:
    good = sum(limit is None or value <= limit for value in values)
    count = len(values) + num_refused
    return good / count if count else 1.0


# --- prices that are slower by a factor -----------------------------------------------------


def slower(fleet: Fleet, factor: float) -> Fleet:
    """The same fleet, each of whose steps takes `factor` times as long. Links stay as they are."""
    apart = fleet.disaggregation
    if apart is not None:
        apart = replace(apart, prefill=_slower(apart.prefill, factor))
    return replace(fleet, replica=_slower(fleet.replica, factor), disaggregation=apart)


def _slower(spec: ReplicaSpec, factor: float) -> ReplicaSpec:
    own, pipeline = spec.step_time, spec.pipeline
    if pipeline is not None:
        passage, following = pipeline.passage, pipeline.next_passages
        pipeline = replace(
            pipeline,
            passage=lambda shape: _slower_passage(passage(shape), factor),
            next_passages=lambda pasts: (_slower_passage(p, factor) for p in following(pasts)),
        )
    return replace(
        spec,
        step_time=lambda shape: factor * own(shape),
        next_token_times=_slower_times(spec.next_token_times, factor),
        pipeline=pipeline,
    )


def _slower_times(
    times: Callable[[Sequence[int]], Iterator[float]] | None, factor: float
) -> Callable[[Sequence[int]], Iterator[float]] | None:
    if times is None:
        return None
    return lambda pasts: (factor * each for each in times(pasts))


def _slower_passage(passage: Passage, factor: float) -> Passage:
    return passage._replace(stages_s=tuple([factor * each for each in passage.stages_s]))
