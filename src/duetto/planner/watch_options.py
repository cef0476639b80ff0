"""When the planner that watches changes something: limits, margins, patience. Knows no cluster."""

from dataclasses import dataclass

from duetto.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """When the planner changes something."""

    target: float = 0.95
    """The part of requests that is to keep each limit."""
    margin: float = 0.02
    """So much above the target must be expected of fewer workers."""
    headroom: float = 1.15
    """So many times the measured rate a layout must serve."""
    agree_more: int = 1
    """Windows in a row that must ask for more workers, or for other roles."""
    agree_fewer: int = 3
    """Windows in a row that must allow fewer."""
    dwell_more: float = 30.0
    """Seconds after a change before workers are added."""
    dwell_fewer: float = 180.0
    """Seconds after a change before workers are taken away; longer, where that was wrong before."""
    max_step: int = 2
    """Workers that a decision may add, take away or give another role."""
    min_replicas: int = 1
    """Never fewer that answer."""
    max_workers: int = 8
    """Never more of all roles."""
    min_requests: int = 10
    """Fewer that ended in a window say nothing of lengths and latencies."""
    disaggregate: bool = True
    """Consider workers that compute prompts only."""

    def __post_init__(self) -> None:
        if not (0 < self.target <= 1 and 0 <= self.margin < 1):
            raise ConfigError("--target: must be above 0 and at most 1, --margin from 0 to 1")
        if not 0 < self.headroom <= 10:
            raise ConfigError(f"--headroom {self.headroom}: must be above 0 and at most 10")
        if not 1 <= self.min_replicas <= self.max_workers:
            raise ConfigError(
                f"--min-replicas {self.min_replicas}: must be from 1 to --max-workers, "
                f"{self.max_workers}"
            )
        for name in ("agree_more", "agree_fewer", "max_step", "min_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be 1 or more")
        if min(self.dwell_more, self.dwell_fewer) < 0:
            raise ConfigError("--dwell-more and --dwell-fewer: must be 0 or more")
