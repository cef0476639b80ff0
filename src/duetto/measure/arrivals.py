"""When requests arrive: at a rate with a chosen burstiness, or at a trace's own times.

Open loop: a request arrives whether or not earlier ones have been answered. The closed loop, where
a new request arrives when an answer leaves, has no arrival times; client.py drives it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import default_rng

from duetto.core.errors import ConfigError
from duetto.measure.workload import Workload, check_seed


def at_rate(
    workload: Workload, requests_per_s: float, *, burstiness: float = 1.0, seed: int = 0
) -> Workload:
    """The workload with new arrival times, `requests_per_s` on average; inf is all at once.

    As in vLLM: gaps are Gamma(shape=burstiness, scale=1 / (rate * burstiness)), a Poisson process
    at burstiness 1, burstier below and more regular above; then all times are stretched so that
    the last of n requests arrives at n / rate, which makes runs of one rate comparable.
    Raises ConfigError, naming the flag.
    """
    times = arrival_times(len(workload.requests), requests_per_s, burstiness=burstiness, seed=seed)
    return workload.with_arrivals(times)


def arrival_times(
    num_requests: int, requests_per_s: float, *, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """The instants of `at_rate`, in seconds."""
    if not requests_per_s > 0:
        raise ConfigError(f"--request-rate {requests_per_s}: must be above 0, or inf")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"--burstiness {burstiness}: must be above 0; 1 is a Poisson process")
    check_seed(seed)
    if math.isinf(requests_per_s):
        return [0.0] * num_requests
    gaps = default_rng(seed).gamma(burstiness, 1 / (requests_per_s * burstiness), num_requests)
    times = np.cumsum(gaps)
    # Extremely bursty gaps can all round to 0; then the burst is at the end of the time.
    scale = num_requests / requests_per_s / times[-1] if times[-1] > 0 else 0.0
    return [float(time) for time in times * scale]


def at_trace_times(workload: Workload, *, speed: float = 1.0) -> Workload:
    """The workload at its own times, `speed` times as fast, counted from its first request."""
    if not 0 < speed < math.inf:
        raise ConfigError(f"--trace-speed {speed}: must be above 0")
    start = min((request.arrival_s for request in workload.requests), default=0.0)
    return workload.with_arrivals([(r.arrival_s - start) / speed for r in workload.requests])


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalOptions:
    """When requests are sent: the flags of `bench serve`."""

    request_rate: float | Literal["trace"] = math.inf
    """Requests per second; inf sends all at once; trace keeps the dataset's own times."""
    burstiness: float = 1.0
    """Shape of the gaps' gamma distribution: 1 is a Poisson process, below 1 is burstier."""
    trace_speed: float = 1.0
    """With --request-rate trace: how many times as fast as recorded."""
    max_concurrency: int | None = None
    """The most requests under way. With --request-rate inf the loop is closed: a request arrives
    when an answer leaves."""

    @property
    def is_closed_loop(self) -> bool:
        return self.max_concurrency is not None and self.request_rate == math.inf

    def apply(self, workload: Workload, *, has_times: bool, seed: int) -> Workload:
        """The workload at these times; `has_times` if its own mean something.

        Raises ConfigError, naming the flag.
        """
        if self.request_rate != "trace":
            return at_rate(workload, self.request_rate, burstiness=self.burstiness, seed=seed)
        if not has_times:
            raise ConfigError("--request-rate trace: this dataset has no times; azure, mooncake do")
        return at_trace_times(workload, speed=self.trace_speed)

    def as_json(self) -> dict[str, float | str | None]:
        """vLLM's keys; JSON has no infinity, so an infinite rate is the word."""
        return {
            "request_rate": "inf" if self.request_rate == math.inf else self.request_rate,
            "burstiness": self.burstiness,
            "max_concurrency": self.max_concurrency,
        }
