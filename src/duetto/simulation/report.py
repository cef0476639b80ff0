"""What a simulation showed: the metrics of docs/metrics.md, and what the fleet did and cost.

Knows no prices of steps and no schedulers. The same numbers as bench.metrics.summarize makes of
records, from columns: a long trace has millions of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from duetto.core.draft_counts import NO_CHAINS, Chains
from duetto.core.errors import ConfigError
from duetto.core.timings import Part
from duetto.measure.metrics import (
    DEFAULT_PERCENTILES,
    SLO,
    JsonValue,
    LengthsSeen,
    Report,
    distribution,
)
from duetto.simulation.replica import StepLog
from duetto.simulation.reuse import ReuseTotals, total_reuse
from duetto.simulation.simulation import Served, Simulation
from duetto.simulation.tier_totals import TierTotals, total_tiers

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PoolUse:
    """What the replicas of one kind did, all together."""

    num_replicas: int
    num_steps: int
    busy: float  # the part of the duration in which steps ran, mean over replicas
    mean_tokens: float  # of a step
    mean_running: float  # requests, over the time in which steps ran
    max_waiting: int
    num_preemptions: int
    kv_mean: float | None  # blocks that are owned, as a part of all, over the time of steps
    kv_max: float | None
    num_stages: int = 1
    num_batches: int = 1  # that may be under way in a replica
    bubble: float = 0.0  # of the time of its stages while steps ran: the part spent waiting


@dataclass(frozen=True, slots=True)
class Summary:
    """A simulation, summed up."""

    report: Report
    num_devices: int
    pools: Mapping[str, PoolUse]  # "serve"; or "prefill" and "decode"
    parts_s: Mapping[str, float]  # mean E2E latency in parts, as docs/metrics.md has them
    transfer: Floats  # seconds that each KV transfer delayed its request
    price_per_hour: float | None  # of one device
    notes: tuple[str, ...] = ()
    reuse: ReuseTotals | None = None  # None: nothing was marked
    tiers: TierTotals | None = None  # None: there were none

    @property
    def cost_per_million(self) -> float | None:
        """Price of a million output tokens; None without a price or without tokens."""
        if self.price_per_hour is None or not self.report.num_output_tokens:
            return None
        hours = self.report.duration_s / 3600
        return 1e6 * self.price_per_hour * self.num_devices * hours / self.report.num_output_tokens

    def as_json(self) -> dict[str, JsonValue]:
        """`bench serve`'s names, in milliseconds, and what only a simulation knows."""
        result = self.report.as_json() | {
            "num_devices": self.num_devices,
            "mean_parts_ms": {part: spent * 1000 for part, spent in self.parts_s.items()},
            "pools": {name: asdict(use) for name, use in self.pools.items()},
        }
        if self.reuse is not None:
            result["reuse"] = self.reuse.as_json()
        if self.tiers is not None:
            result["tiers"] = self.tiers.as_json()
        if len(self.transfer):
            result["mean_kv_transfer_ms"] = float(self.transfer.mean()) * 1000
        if self.price_per_hour is not None:
            result["price_per_device_hour"] = self.price_per_hour
            result["cost_per_million_output_tokens"] = self.cost_per_million
        return result


def sum_up(
    simulation: Simulation,
    num_devices: int,
    *,
    slo: SLO | None = None,
    percentiles: Sequence[float] = DEFAULT_PERCENTILES,
    price_per_hour: float | None = None,
) -> Summary:
    """Raises ConfigError if every request was refused, with the first refusal."""
    duration = simulation.duration_s
    done = [s for s in simulation.served if s.refusal is None]
    if not done:
        refusal = simulation.served[0].refusal if simulation.served else "there is none"
        raise ConfigError(f"no request can be served: {refusal}")
    pools = {"serve": _use(simulation, duration)}
    if simulation.prefill_steps:
        pools = {
            "prefill": _use(simulation, duration, is_prefill=True),
            "decode": pools["serve"],
        }
    parts = {
        part.value: sum(s.timings.parts[part] for s in done) / max(1, len(done)) for part in Part
    }
    return Summary(
        report=_report(simulation, duration, slo, percentiles),
        num_devices=num_devices,
        pools=pools,
        parts_s=parts,
        transfer=np.array([s.transfer_s for s in done if s.transfer_s > 0]),
        price_per_hour=price_per_hour,
        notes=simulation.notes,
        reuse=total_reuse([s.timings for s in done]),
        tiers=total_tiers(
            simulation.tiers,
            sum(s.num_prompt_tokens for s in done),
            sum(s.num_cached_tokens for s in done),
        ),
    )


def _report(
    simulation: Simulation, duration: float, slo: SLO | None, percentiles: Sequence[float]
) -> Report:
    done = [s for s in simulation.served if s.refusal is None]
    if not duration > 0:
        raise ValueError("a report needs a duration above 0")
    times = [np.array(s.timings.token_times) for s in done]
    gaps = [np.diff(t) for t in times]
    ttft = np.array([t[0] - s.timings.arrival_time for s, t in zip(done, times, strict=True)])
    e2e = np.array([t[-1] - s.timings.arrival_time for s, t in zip(done, times, strict=True)])
    tpot = np.array([(t[-1] - t[0]) / (len(t) - 1) if len(t) > 1 else 0.0 for t in times])
    worst = np.array([g.max() if len(g) else 0.0 for g in gaps])
    several = np.array([len(t) > 1 for t in times])
    ttfts, e2es = (distribution(values, percentiles) for values in (ttft, e2e))
    num_good = None
    if slo is not None:
        rows = zip(ttft.tolist(), worst.tolist(), tpot.tolist(), e2e.tolist(), strict=True)
        num_good = sum(slo.admits(ttft=a, itl=b, tpot=c, e2e=d) for a, b, c, d in rows)
    return Report(
        duration_s=duration,
        num_ok=len(done),
        num_failed=len(simulation.served) - len(done),
        num_aborted=0,
        num_input_tokens=sum(s.num_prompt_tokens for s in done),
        num_output_tokens=sum(map(len, times)),
        num_cached_tokens=sum(s.num_cached_tokens for s in done),
        num_untimed_tokens=0,
        ttft=ttfts,
        tpot=distribution(tpot[several], percentiles),
        itl=distribution(np.concatenate(gaps), percentiles),
        e2e=e2es,
        ttft_from_arrival=ttfts,
        e2e_from_arrival=e2es,
        held=distribution(np.zeros(len(simulation.served)), percentiles),
        slo=slo,
        num_good=num_good,
        errors=_refusals(simulation.served),
        prompt_lengths=LengthsSeen(tuple(s.num_prompt_tokens for s in done), None),
        output_lengths=LengthsSeen(tuple(map(len, times)), None),
        drafts=reduce(
            Chains.plus,
            [s.timings.speculation.chains for s in done if s.timings.speculation is not None],
            NO_CHAINS,
        ),
    )


def _refusals(served: Sequence[Served]) -> dict[str, int]:
    """The first refusal in words; each has its own numbers, and a thousand would tell no more."""
    refusals = [s.refusal for s in served if s.refusal is not None]
    return {refusals[0]: len(refusals)} if refusals else {}


def _use(simulation: Simulation, duration: float, *, is_prefill: bool = False) -> PoolUse:
    logs, num_blocks = simulation.steps, simulation.num_blocks
    computed_s = simulation.computed_s
    if is_prefill:
        logs, num_blocks = simulation.prefill_steps, simulation.num_prefill_blocks
        computed_s = simulation.prefill_computed_s
    starts, ends, tokens, running, free = (
        np.concatenate([np.asarray(getattr(log, name)) for log in logs])
        for name in (
            "start_time",
            "end_time",
            "num_tokens",
            "num_running",
            "num_free_blocks",
        )
    )
    num_stages, num_batches = simulation.num_stages, simulation.num_batches
    num_replicas = len(logs) // num_batches
    spent = ends - starts
    total, busy = float(spent.sum()), _busy(logs, num_batches)
    if not total:
        return PoolUse(num_replicas, len(spent), 0.0, 0.0, 0.0, 0, 0, None, None)
    owned = 1 - free / num_blocks
    return PoolUse(
        num_replicas=num_replicas,
        num_steps=len(spent),
        busy=busy / (duration * num_replicas),
        mean_tokens=float(tokens.mean()),
        mean_running=float((running * spent).sum()) / busy,
        max_waiting=_max_waiting(logs, num_batches),
        num_preemptions=sum(sum(log.num_preemptions) for log in logs),
        kv_mean=float((owned * spent).sum()) / total,
        kv_max=float(owned.max()),
        num_stages=num_stages,
        num_batches=num_batches,
        bubble=max(0.0, 1 - computed_s / (num_stages * busy)) if num_stages > 1 else 0.0,
    )


def _busy(logs: Sequence[StepLog], num_batches: int) -> float:
    """Seconds in which at least one batch of a replica was under way, of all replicas together."""
    busy = 0.0
    for first in range(0, len(logs), num_batches):
        own = logs[first : first + num_batches]
        starts = np.concatenate([np.asarray(log.start_time) for log in own])
        ends = np.concatenate([np.asarray(log.end_time) for log in own])
        if not len(starts):
            continue
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        idle = np.maximum(0.0, starts[1:] - ends[:-1])  # between two stretches without a gap
        busy += float(ends[-1] - starts[0] - idle.sum())
    return busy


def _max_waiting(logs: Sequence[StepLog], num_batches: int) -> int:
    """In one replica: those of all its engines at the same instant."""
    most = 0
    for first in range(0, len(logs), num_batches):
        own = [log for log in logs[first : first + num_batches] if len(log)]
        if not own:
            continue
        changes = np.concatenate([np.diff(log.num_waiting, prepend=0) for log in own])
        order = np.argsort(np.concatenate([np.asarray(log.end_time) for log in own]), kind="stable")
        most = max(most, int(np.cumsum(changes[order]).max()))
    return most
