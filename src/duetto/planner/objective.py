"""When a deployment is good enough: limits on latencies at a percentile, and what binds them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from duetto.bench.metrics import SLO, SLO_METRICS, Report, parse_slo
from duetto.core.errors import ConfigError

# Limits in seconds that nobody means: whoever writes itl=50 thinks of milliseconds.
_TOO_LONG_S = {"ttft": 100.0, "itl": 5.0, "tpot": 5.0, "e2e": 1000.0}


def read_slo(texts: Sequence[str]) -> SLO:
    """Limits like `ttft=1,itl=50ms`, in seconds where no unit is named.

    Raises ConfigError as parse_slo does, and for a number without a unit that is plainly one of
    milliseconds, as `bench serve` takes them.
    """
    slo = parse_slo(texts, unit="s")
    for name, number in re.findall(r"(\w+)\s*[=:]\s*([0-9.]+)\s*(?:,|$)", ",".join(texts)):
        if float(number) >= _TOO_LONG_S[{"e2el": "e2e"}.get(name, name)]:
            raise ConfigError(
                f"--slo {name}={number}: is {number} seconds here; write {name}={number}ms for "
                f"milliseconds, or {name}={number}s if seconds are meant"
            )
    return slo


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
            raise ConfigError("--slo: needs at least one limit, like ttft=1,itl=50ms")

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
