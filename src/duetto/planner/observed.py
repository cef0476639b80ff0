"""What a running cluster's /metrics say between two looks: its load, and how well it is served.

The names are vLLM's, which our servers and routers export. What a server says is not trusted: its
size is bounded, and what does not parse is refused. Knows no HTTP and no clock.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import inf, isfinite

from duetto.core.errors import DuettoError
from duetto.measure.metrics import SLO
from duetto.planner.buckets import Buckets, from_cumulative
from duetto.planner.resampled import MeasuredLoad

MOST_TEXT = 8 * 2**20  # bytes of one server's metrics
_HISTOGRAMS = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "prompts": "vllm:request_prompt_tokens",
    "answers": "vllm:request_generation_tokens",
}
_NUMBERS = {
    "finished": "vllm:request_success_total",
    "queried": "vllm:prefix_cache_queries_total",
    "hit": "vllm:prefix_cache_hits_total",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
}
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{([^{}]*)\})?\s+(\S+)(?:\s+-?\d+)?\s*")
_LE = re.compile(r'(?:^|,)\s*le="([^"]*)"')


class MetricsError(DuettoError):
    """What a server shows under /metrics cannot be read."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One server's counters at one instant, all its engines together."""

    histograms: Mapping[str, Buckets]
    numbers: Mapping[str, float]
    role: str = "both"


def read_snapshot(text: str, role: str = "both") -> Snapshot:
    """Raises MetricsError for what is no exposition, or lacks what every engine has."""
    if len(text) > MOST_TEXT:
        raise MetricsError(f"/metrics: more than {MOST_TEXT} characters")
    wanted = {f"{name}_{part}" for name in _HISTOGRAMS.values() for part in ("bucket", "sum")}
    wanted |= set(_NUMBERS.values())
    found: dict[str, list[tuple[str, float]]] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise MetricsError(f"/metrics: {line!r:.80} is no line of the text format")
        if match[1] in wanted:
            found.setdefault(match[1], []).append((match[2] or "", _number(match[3])))
    missing = _NUMBERS["running"]
    if missing not in found:
        raise MetricsError(f"/metrics: {missing} is missing: is this a server of an engine?")
    histograms = {key: _histogram(found, name) for key, name in _HISTOGRAMS.items()}
    numbers = {key: sum(v for _, v in found.get(name, ())) for key, name in _NUMBERS.items()}
    numbers["kv_usage"] /= max(1, len(found.get(_NUMBERS["kv_usage"], ())))
    return Snapshot(histograms, numbers, role)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MetricsError(f"/metrics: {text!r:.40} is no number") from None


def _histogram(found: Mapping[str, list[tuple[str, float]]], name: str) -> Buckets:
    """All series of the name together: their bounds are those of one server."""
    upto: dict[float, float] = {}
    for labels, count in found.get(f"{name}_bucket", ()):
        bound = _LE.search(labels)
        if bound is None or not isfinite(count):
            raise MetricsError(f"/metrics: {name}_bucket without le, or without a number")
        upto[_number(bound[1])] = upto.get(_number(bound[1]), 0.0) + count
    if not upto:
        return Buckets()
    try:
        return from_cumulative([*upto.items()], sum(v for _, v in found.get(f"{name}_sum", ())))
    except ValueError as error:
        raise MetricsError(f"/metrics: {name}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a cluster did between two instants."""

    end_s: float
    duration_s: float
    num_finished: float
    rate: float  # arrivals per second
    ttft: Buckets
    tpot: Buckets
    prompts: Buckets
    answers: Buckets
    hit_rate: float = 0.0  # of prompt tokens
    num_running: float = 0.0  # at its end
    num_waiting: float = 0.0
    utilisation: Mapping[str, float] = field(default_factory=dict)  # KV in use, by role

    def load(self) -> MeasuredLoad:
        return MeasuredLoad(self.rate, self.prompts, self.answers, self.hit_rate)

    def within(self, limits: SLO) -> float | None:
        """The lesser of the parts of requests within each limit; None without requests. A request
        of one token has no TPOT."""
        shares = [
            values.share_within(limit)
            for values, limit in ((self.ttft, limits.ttft), (self.tpot, limits.tpot))
            if limit is not None
        ]
        return min((share for share in shares if share is not None), default=None)


def window_between(
    before: Sequence[Snapshot | None],
    after: Sequence[Snapshot | None],
    *,
    end_s: float,
    duration_s: float,
) -> Window:
    """Of servers in one order, None for those that did not answer. What one counted that did not
    answer before, or began again, counts from zero. Raises MetricsError if none answers."""
    pairs = [
        (old or _nothing(new), new)
        for old, new in zip(before, after, strict=True)
        if new is not None
    ]
    if not pairs:
        raise MetricsError("no server answered")

    def more(key: str) -> float:
        grown = [(new.numbers[key], new.numbers[key] - old.numbers[key]) for old, new in pairs]
        return sum(now if added < 0 else added for now, added in grown)

    def values(key: str) -> Buckets:
        parts = [new.histograms[key].since(old.histograms[key]) for old, new in pairs]
        return reduce(Buckets.plus, parts, Buckets())

    def now(key: str, which: int = 1) -> float:
        return sum(pair[which].numbers[key] for pair in pairs)

    under_way = now("running") + now("waiting") - now("running", 0) - now("waiting", 0)
    queried, finished = more("queried"), more("finished")
    return Window(
        end_s=end_s,
        duration_s=duration_s,
        num_finished=finished,
        rate=max(0.0, finished + under_way) / duration_s,
        ttft=values("ttft"),
        tpot=values("tpot"),
        prompts=values("prompts"),
        answers=values("answers"),
        hit_rate=min(1.0, more("hit") / queried) if queried else 0.0,
        num_running=now("running"),
        num_waiting=now("waiting"),
        utilisation=_by_role([new for _, new in pairs]),
    )


def _nothing(like: Snapshot) -> Snapshot:
    """Before a server was seen. What is under way when it is first seen did not arrive just now."""
    under_way = {key: like.numbers[key] for key in ("running", "waiting")}
    zero = dict.fromkeys(like.numbers, 0.0) | under_way
    return Snapshot(dict.fromkeys(like.histograms, Buckets()), zero, like.role)


def _by_role(snapshots: Sequence[Snapshot]) -> dict[str, float]:
    roles: dict[str, list[float]] = {}
    for snapshot in snapshots:
        roles.setdefault(snapshot.role, []).append(min(inf, snapshot.numbers["kv_usage"]))
    return {role: sum(used) / len(used) for role, used in sorted(roles.items())}
