"""A decision of the planner, explained: what was seen, what would be, why this and why not now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from duetto.measure.metrics import SLO, JsonValue
from duetto.planner.buckets import Buckets
from duetto.planner.forecast import Forecast, RoleCounts
from duetto.planner.observed import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do after one window. `target` is what there is now, where nothing is to change."""

    time_s: float
    action: Literal["stay", "change"]
    current: RoleCounts
    target: RoleCounts
    seen: str
    why: str
    learned: str = ""
    forecasts: tuple[Forecast, ...] = ()  # of what there is now first
    slowdown: float = 1.0  # how many times their price steps take, as learned so far

    @property
    def words(self) -> tuple[str, ...]:
        """In lines, the conclusion last."""
        head = f"change to {self.target}" if self.action == "change" else f"stay at {self.current}"
        learned = (self.learned,) if self.learned else ()
        would = tuple(f"  {forecast}" for forecast in self.forecasts)
        return (f"seen: {self.seen}", *learned, *would, f"{head}: {self.why}")

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "time_s": self.time_s,
            "action": self.action,
            "current": _counts_json(self.current),
            "target": _counts_json(self.target),
            "seen": self.seen,
            "learned": self.learned,
            "why": self.why,
            "slowdown": self.slowdown,
            "forecasts": [_forecast_json(forecast) for forecast in self.forecasts],
        }


def describe_window(window: Window, limits: SLO) -> str:
    """What was seen, in one line."""
    parts = [
        f"{window.duration_s:.0f} s, {window.rate:.2f} requests/s",
        f"prompts {_lengths(window.prompts)}, answers {_lengths(window.answers)} tokens",
        f"{window.hit_rate:.0%} of prompt tokens cached",
        f"TTFT {_share(window.ttft, limits.ttft)}, TPOT {_share(window.tpot, limits.tpot)}",
        f"{window.num_running:.0f} running and {window.num_waiting:.0f} waiting at its end",
    ]
    parts += [f"KV of {role} {used:.0%} used" for role, used in window.utilisation.items()]
    return "; ".join(parts)


def _lengths(values: Buckets) -> str:
    mean, high = values.mean, values.quantile(0.9)
    return "unknown" if mean is None or high is None else f"{mean:.0f} (p90 {high:.0f})"


def _share(values: Buckets, limit_s: float | None) -> str:
    if limit_s is None:
        return "without a limit"
    share = values.share_within(limit_s)
    return "of none" if share is None else f"{share:.1%} within {limit_s * 1000:g} ms"


def _counts_json(counts: RoleCounts) -> JsonValue:
    return {"replicas": counts.replicas, "prefill_replicas": counts.prefill}


def _forecast_json(forecast: Forecast) -> JsonValue:
    values: Sequence[tuple[str, JsonValue]] = (
        ("layout", _counts_json(forecast.counts)),
        ("within_limits", forecast.within),
        ("ttft_p50_s", forecast.ttft_p50_s),
        ("ttft_p99_s", forecast.ttft_p99_s),
        ("tpot_mean_s", forecast.tpot_mean_s),
        ("refusal", forecast.refusal or None),
    )
    return dict(values)
