"""From measured times to efficiencies: one set for each kind of operation, never for one size.

What is minimised is the mean of |log(predicted / measured)|: a time twice too long weighs as much
as one twice too short, short calls as much as long ones, and a few odd measurements do not bend
the rest. Knows no clock: who measures hands in what was measured.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from statistics import fmean

from duetto.core.shape import BatchShape
from duetto.pricing.hardware import HardwareSpec, KernelEfficiency, KernelPoint, Kind
from duetto.program.op import Op
from duetto.program.program import Program
from duetto.program.shape import Precision, num_rows

Values = dict[str, float]
SECONDS = (1e-9, 1.0)  # the range of what may be fitted, by what it is
FRACTION = (1e-4, 1.0)
ROWS = (1e-3, 1e4)

_RANGES = {
    "compute": FRACTION,
    "memory": FRACTION,
    "half_rows": ROWS,
    "call_s": SECONDS,
    "row_s": SECONDS,
}
_MATRIX = {"compute": 0.3, "half_rows": 4.0}
_ANY = {"memory": 0.5, "call_s": 1e-6}
_STARTS: dict[Kind, dict[str, float]] = {
    "linear": _MATRIX | _ANY,
    "attention": {"compute": 0.1, "row_s": 1e-6} | _ANY,
}


@dataclass(frozen=True, slots=True)
class KernelSample:
    """One measurement: of one call, or of a few alike that were measured together."""

    compute_s: float  # FLOPs / peak
    memory_s: float  # bytes / bandwidth
    rows: int
    measured_s: float
    calls: int = 1


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What each operation of a program took in one step."""

    program: Program
    precision: Precision
    arithmetic: str
    shape: BatchShape
    times: tuple[tuple[Op, float], ...]
    outside_s: float  # of the backend, in no operation

    def samples(self, hardware: HardwareSpec) -> list[tuple[Kind, KernelSample]]:
        """One for each of a layer's operations, its calls in all layers together."""
        alike: dict[tuple[Kind, str], list[tuple[Op, float]]] = defaultdict(list)
        for op, seconds in self.times:
            alike[op.kind, op.label(self.program)].append((op, seconds))
        return [(kind, self._sample(calls, kind, hardware)) for (kind, _), calls in alike.items()]

    def points(self, hardware: HardwareSpec) -> list[KernelPoint]:
        """For people: each kind, and the fraction of its roof that it reaches."""
        kinds: dict[Kind, list[KernelSample]] = defaultdict(list)
        for kind, sample in self.samples(hardware):
            kinds[kind].append(sample)
        first = self.shape.requests[0]
        return [
            KernelPoint(
                kind=kind,
                arithmetic=self.arithmetic,
                requests=len(self.shape.requests),
                rows=self.shape.num_tokens,
                context=first.num_past,
                time_s=sum(one.measured_s for one in own),
                fraction=sum(max(one.compute_s, one.memory_s) for one in own)
                / sum(one.measured_s for one in own),
            )
            for kind, own in kinds.items()
        ]

    def _sample(
        self, calls: Sequence[tuple[Op, float]], kind: Kind, hardware: HardwareSpec
    ) -> KernelSample:
        costs = [op.cost(self.shape, self.precision) for op, _ in calls]
        peak = hardware.peak_of(kind, self.arithmetic)
        return KernelSample(
            compute_s=sum(cost.flops for cost in costs) / peak,
            memory_s=sum(cost.bytes_moved for cost in costs) / hardware.memory_bandwidth,
            rows=num_rows(self.shape, calls[0][0].rows),
            measured_s=sum(seconds for _, seconds in calls),
            calls=len(calls),
        )


def fit_kinds(
    steps: Iterable[MeasuredStep], hardware: HardwareSpec
) -> dict[Kind, KernelEfficiency]:
    """The efficiency of every kind of operation that was measured."""
    by_kind: dict[Kind, list[KernelSample]] = defaultdict(list)
    for step in steps:
        for kind, sample in step.samples(hardware):
            by_kind[kind].append(sample)
    return {kind: fit_kernel(own, _STARTS.get(kind, _ANY)) for kind, own in by_kind.items()}


def fit_kernel(samples: Sequence[KernelSample], start: Mapping[str, float]) -> KernelEfficiency:
    """The efficiency of a kind of kernel, from calls of many sizes.

    Only what `start` names is fitted, from there; the rest stays at its default.
    """

    def loss(values: Values) -> float:
        kernel = KernelEfficiency(**values)
        return fmean(abs(log(predicted(sample, kernel) / sample.measured_s)) for sample in samples)

    return KernelEfficiency(**minimise(loss, start, {name: _RANGES[name] for name in start}))


def predicted(sample: KernelSample, kernel: KernelEfficiency) -> float:
    """Seconds that a sample should have taken; what CostModel says of the same call."""
    compute_s = sample.compute_s * (1 + kernel.half_rows / sample.rows) / kernel.compute
    fixed_s = kernel.call_s + kernel.row_s * sample.rows
    return max(compute_s, sample.memory_s / kernel.memory) + fixed_s * sample.calls


def minimise(
    loss: Callable[[Values], float],
    start: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    *,
    finest: float = 1e-3,
) -> Values:
    """The values of least loss that a pattern search (Hooke and Jeeves, 1961) finds from `start`.

    Each value in turn is multiplied or divided by a step of its own, which grows where that helps
    and shrinks where it does not, until all steps are below `finest`. Deterministic. Every value
    is above 0 and stays within its range.
    """
    best = dict(start)
    least = loss(best)
    steps = dict.fromkeys(best, 0.4)
    while max(steps.values(), default=0.0) > finest:
        for name, step in steps.items():
            low, high = ranges[name]
            for factor in (exp(step), exp(-step)):
                value = min(max(best[name] * factor, low), high)
                tried = best | {name: value}
                found = loss(tried) if value != best[name] else inf
                if found < least:
                    best, least, steps[name] = tried, found, min(step * 1.5, 1.0)
                    break
            else:
                steps[name] = step / 2
    return best
