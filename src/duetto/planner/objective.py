"""When a deployment is good enough: limits on latencies at a percentile, and what binds them."""

from collections.abc import Mapping
from dataclasses import dataclass

from duetto.core.errors import ConfigError
from duetto.measure.metrics import SLO, SLO_METRICS, Report


@dataclass(frozen=True, slots=True)
class Objective:
    """The percentile of each latency must lie within its limit, as MLPerf and Sarathi-Serve have
    it. TTFT, TPOT and E2E are over requests, ITL over gaps (docs/metrics.md).

    The limit on ITL also holds for TPOT, a request's own mean of gaps: else a queue between its
    first token and its second, where prefill and decode are apart, would hide among many gaps.
    """

    slo: SLO
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ConfigError(f"--percentile {self.percentile}: must be above 0, at most 100")
        if not self.limits:
            raise ConfigError("--slo: needs at least one limit, like ttft=1s,itl=50ms")

    @property
    def limits(self) -> dict[str, float]:
        """Seconds, by metric."""
        values = {name: getattr(self.slo, name) for name in SLO_METRICS}
        return {name: value for name, value in values.items() if value is not None}

    def describe(self) -> str:
        """With units: p99 of ttft 1000 ms, itl 50 ms."""
        limits = ", ".join(f"{name} {value * 1000:g} ms" for name, value in self.limits.items())
        return f"p{self.percentile:g} of {limits}"

    def reached(self, report: Report) -> dict[str, float]:
        """The percentile of each limited latency, in seconds. A refused request has no latency,
        and counts as one that is never answered."""
        reached: dict[str, float] = {}
        for name in self.limits:
            judged = (report.itl, report.tpot) if name == "itl" else (getattr(report, name),)
            reached[name] = max(d.percentiles[self.percentile] or 0.0 for d in judged)
        if report.num_failed > (1 - self.percentile / 100) * report.num_requests:
            reached = dict.fromkeys(reached, float("inf"))
        return reached

    def binding(self, reached: Mapping[str, float]) -> tuple[str, float]:
        """The latency that is nearest to its limit or farthest beyond it, and how many times the
        limit it is."""
        limits = self.limits
        name = max(limits, key=lambda each: reached[each] / limits[each])
        return name, reached[name] / limits[name]
