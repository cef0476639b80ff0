"""From records to a report. Every formula is stated for people in docs/metrics.md.

Knows no network and no engine: a record is a record, whoever took it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from duetto.core.draft_counts import NO_CHAINS, Chains, tokens_per_step
from duetto.core.errors import ConfigError
from duetto.measure.records import RequestRecord

DEFAULT_PERCENTILES = (50.0, 90.0, 99.0)
SLO_METRICS = ("ttft", "itl", "tpot", "e2e")

JsonValue = float | int | str | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class Distribution:
    """A sample's mean, spread and percentiles, in the sample's own unit.

    Percentiles interpolate linearly between order statistics (numpy's default, Hyndman and Fan's
    type 7). An empty sample has count 0 and None everywhere: absence is not zero.
    """

    count: int
    mean: float | None
    std: float | None
    max: float | None
    percentiles: Mapping[float, float | None]

    @property
    def median(self) -> float | None:
        return self.percentiles[50.0]


def distribution(
    sample: Sequence[float] | NDArray[np.float64],
    percentiles: Sequence[float] = DEFAULT_PERCENTILES,
) -> Distribution:
    """The distribution of `sample`; the median is always among the percentiles."""
    wanted = sorted({50.0, *percentiles})
    if not len(sample):
        return Distribution(0, None, None, None, dict.fromkeys(wanted))
    values = np.asarray(sample, dtype=np.float64)
    points = np.percentile(values, wanted)
    return Distribution(
        count=len(sample),
        mean=float(values.mean()),
        std=float(values.std()),
        max=float(values.max()),
        percentiles=dict(zip(wanted, points.tolist(), strict=True)),
    )


@dataclass(frozen=True, slots=True)
class SLO:
    """Limits in seconds that a request must meet together; None is no limit.

    `itl` bounds the largest gap of the request. TTFT and E2E are taken from the scheduled arrival:
    a user's wait does not become shorter because the client was late to send.
    """

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def is_met(self, record: RequestRecord) -> bool:
        """Whether the request came through and met every limit.

        A request of one token has no gap, so it meets `itl` and `tpot`; one without any token
        has no first token, so it never meets `ttft`.
        """
        if record.outcome != "ok":
            return False
        return self.admits(
            ttft=np.inf if record.ttft_s is None else record.ttft_s + record.held_s,
            itl=max(record.itl_s, default=0.0) if self.itl is not None else 0.0,
            tpot=record.tpot_s or 0.0,
            e2e=record.e2e_s + record.held_s,
        )

    def admits(self, **measured: float) -> bool:
        """Whether a request's ttft, largest itl, tpot and e2e, all given, are within the limits."""
        limits = ((name, getattr(self, name)) for name in SLO_METRICS)
        return all(limit is None or measured[name] <= limit for name, limit in limits)

    def as_ms(self) -> dict[str, float]:
        limits = ((name, getattr(self, name)) for name in SLO_METRICS)
        return {name: limit * 1000 for name, limit in limits if limit is not None}


def parse_slo(texts: Sequence[str]) -> SLO:
    """Read `ttft=1s,itl=50ms`, or `ttft:1s e2el:2s` with vLLM's names. Of several texts (a flag
    that is given again) the last one counts, for each name.

    Raises ConfigError, naming the part at fault. A number without a unit is asked about: some
    tools mean seconds, others milliseconds.
    """
    limits: dict[str, float] = {}
    for text in texts:
        named = [_limit(part) for part in text.split(",")]
        if twice := {name for name, _ in named if [n for n, _ in named].count(name) > 1}:
            raise ConfigError(f"--slo {text}: {min(twice)} is given twice")
        limits |= named
    return SLO(**limits)


def _limit(part: str) -> tuple[str, float]:
    """The name and the limit in seconds."""
    match = re.fullmatch(r"\s*(\w+)\s*[=:]\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(ms|s)?\s*", part)
    name = {"e2el": "e2e"}.get(match[1], match[1]) if match else ""
    if match is None or name not in SLO_METRICS or float(match[2]) <= 0:
        raise ConfigError(
            f"--slo: {part!r} is not NAME=LIMIT with NAME one of {', '.join(SLO_METRICS)} and "
            f"LIMIT above 0 with its unit, ms or s; like ttft=1s,itl=50ms"
        )
    if match[3] is None:
        raise ConfigError(
            f"--slo {part.strip()}: needs a unit: {name}={match[2]}ms or {name}={match[2]}s?"
        )
    return name, float(match[2]) * (1.0 if match[3] == "s" else 0.001)


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Read `50,90,99`. Raises ConfigError for what is no such list."""
    try:
        wanted = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--metric-percentiles {text!r}: must be numbers with commas, like 50,90,99"
        ) from None
    if not all(0 <= each <= 100 for each in wanted):
        raise ConfigError(f"--metric-percentiles {text}: each must be from 0 to 100")
    return wanted


@dataclass(frozen=True, slots=True)
class LengthsSeen:
    """How long prompts or answers were, in tokens, and how long they were to be."""

    got: tuple[int, ...]
    asked: tuple[int, ...] | None  # None: nobody asked for lengths

    @property
    def num_shorter(self) -> int:
        return sum(got < asked for got, asked in zip(self.got, self.asked or (), strict=False))

    @property
    def are_as_asked(self) -> bool:
        return self.got == self.asked

    def as_json(self, name: str) -> dict[str, JsonValue]:
        """mean_, min_ and max_ of `name`, and of `asked_name` if lengths were asked for."""
        both = {name: self.got, f"asked_{name}": self.asked}
        return {
            f"{word}_{which}": of(lengths)
            for which, lengths in both.items()
            for word, of in (("mean", _mean), ("min", min), ("max", max))
            if lengths
        }


NO_LENGTHS = LengthsSeen((), None)


def _mean(lengths: Sequence[int]) -> float:
    return sum(lengths) / len(lengths)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run showed. Latencies in seconds; only requests that came through count in them."""

    duration_s: float
    num_ok: int
    num_failed: int
    num_aborted: int
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_untimed_tokens: int  # counted by the server, but in no chunk
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2e: Distribution
    ttft_from_arrival: Distribution
    e2e_from_arrival: Distribution
    held: Distribution  # of all requests: how late the client sent them
    slo: SLO | None
    num_good: int | None  # None without an SLO
    errors: Mapping[str, int]  # message -> how often
    prompt_lengths: LengthsSeen = NO_LENGTHS  # these two of requests that came through
    output_lengths: LengthsSeen = NO_LENGTHS
    drafts: Chains = NO_CHAINS

    @property
    def num_requests(self) -> int:
        return self.num_ok + self.num_failed + self.num_aborted

    def per_second(self, count: int) -> float:
        return count / self.duration_s

    def as_json(self) -> dict[str, JsonValue]:
        """Flat, in milliseconds; names of `vllm bench serve` where it has one."""
        result: dict[str, JsonValue] = {
            "duration": self.duration_s,
            "completed": self.num_ok,
            "failed": self.num_failed,
            "aborted": self.num_aborted,
            "total_input_tokens": self.num_input_tokens,
            "total_output_tokens": self.num_output_tokens,
            "total_cached_tokens": self.num_cached_tokens,
            "untimed_output_tokens": self.num_untimed_tokens,
            **self.prompt_lengths.as_json("input_len"),
            **self.output_lengths.as_json("output_len"),
            "ended_early": self.output_lengths.num_shorter,
            "request_throughput": self.per_second(self.num_ok),
            "output_throughput": self.per_second(self.num_output_tokens),
            "total_token_throughput": self.per_second(
                self.num_input_tokens + self.num_output_tokens
            ),
        }
        result |= _drafts_json(self.drafts, self.num_output_tokens)
        if self.slo is not None and self.num_good is not None:
            goodput = self.per_second(self.num_good)
            result |= {"goodput": goodput, "request_goodput": goodput, "slo_ms": self.slo.as_ms()}
            result["slo_attainment"] = self.num_good / self.num_requests
        for name, values in (
            ("ttft", self.ttft),
            ("tpot", self.tpot),
            ("itl", self.itl),
            ("e2el", self.e2e),
            ("ttft_from_arrival", self.ttft_from_arrival),
            ("e2el_from_arrival", self.e2e_from_arrival),
            ("client_delay", self.held),
        ):
            result |= _in_milliseconds(name, values)
        return result | {"errors": dict(self.errors)}


def summarize(
    records: Sequence[RequestRecord],
    duration_s: float,
    *,
    slo: SLO | None = None,
    percentiles: Sequence[float] = DEFAULT_PERCENTILES,
) -> Report:
    """The report of one run that lasted `duration_s`, from its first arrival to its last answer.

    Raises ValueError without records or with a duration that is not positive.
    """
    if not records or not duration_s > 0:
        raise ValueError("a report needs at least one record and a duration above 0")
    ok = [r for r in records if r.outcome == "ok"]
    first = [(r.ttft_s, r.held_s) for r in ok if r.ttft_s is not None]
    tpots = [tpot for r in ok if (tpot := r.tpot_s) is not None]
    errors: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            errors[record.error] = errors.get(record.error, 0) + 1
    num_output_tokens = sum(r.num_output_tokens for r in ok)
    return Report(
        duration_s=duration_s,
        num_ok=len(ok),
        num_failed=sum(r.outcome == "failed" for r in records),
        num_aborted=sum(r.outcome == "aborted" for r in records),
        num_input_tokens=sum(r.num_prompt_tokens for r in ok),
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(r.num_cached_tokens for r in ok),
        drafts=reduce(Chains.plus, (r.drafts for r in ok), NO_CHAINS),
        num_untimed_tokens=num_output_tokens - sum(c.num_tokens for r in ok for c in r.chunks),
        prompt_lengths=_lengths([(r.num_prompt_tokens, r.num_prompt_tokens_asked) for r in ok]),
        output_lengths=_lengths([(r.num_output_tokens, r.num_output_tokens_asked) for r in ok]),
        ttft=distribution([ttft for ttft, _ in first], percentiles),
        tpot=distribution(tpots, percentiles),
        itl=distribution([gap for r in ok for gap in r.itl_s], percentiles),
        e2e=distribution([r.e2e_s for r in ok], percentiles),
        ttft_from_arrival=distribution([ttft + held for ttft, held in first], percentiles),
        e2e_from_arrival=distribution([r.e2e_s + r.held_s for r in ok], percentiles),
        held=distribution([r.held_s for r in records], percentiles),
        slo=slo,
        num_good=None if slo is None else sum(slo.is_met(r) for r in records),
        errors=errors,
    )


def _drafts_json(drafts: Chains, num_output_tokens: int) -> dict[str, JsonValue]:
    """Under the names of `vllm bench serve`, and `tokens_per_step`; nothing if no drafts ran."""
    total = drafts.total
    if not total.num_proposed:
        return {}
    shown: dict[str, JsonValue] = {
        "spec_decode_draft_tokens": total.num_proposed,
        "spec_decode_accepted_tokens": total.num_accepted,
        "spec_decode_acceptance_rate": 100 * (total.acceptance or 0.0),
        "tokens_per_step": tokens_per_step(num_output_tokens, total.num_accepted),
    }
    if drafts.num_chains:
        shown |= {
            "spec_decode_num_drafts": drafts.num_chains,
            "spec_decode_acceptance_length": drafts.mean_length,
            "spec_decode_per_position_acceptance_rates": [
                num_accepted / drafts.num_chains for num_accepted in drafts.accepted
            ],
            "proposed_per_position": drafts.proposed,
            "accepted_per_position": drafts.accepted,
        }
    return shown


def _lengths(pairs: Sequence[tuple[int, int | None]]) -> LengthsSeen:
    asked = tuple(asked for _, asked in pairs if asked is not None)
    return LengthsSeen(
        got=tuple(got for got, _ in pairs), asked=asked if len(asked) == len(pairs) > 0 else None
    )


def _in_milliseconds(name: str, values: Distribution) -> dict[str, JsonValue]:
    def ms(value: float | None) -> float | None:
        return None if value is None else value * 1000

    result: dict[str, JsonValue] = {
        f"mean_{name}_ms": ms(values.mean),
        f"median_{name}_ms": ms(values.median),
        f"std_{name}_ms": ms(values.std),
        f"max_{name}_ms": ms(values.max),
    }
    for percentile, value in values.percentiles.items():
        result[f"p{percentile:g}_{name}_ms"] = ms(value)
    return result
