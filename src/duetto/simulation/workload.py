"""What asks for answers, and when: recorded or synthetic, as lengths and shared beginnings.

No contents: of a prompt it is known how long it is and which of its blocks others have too, and
token ids are made up from that when a request arrives. Knows no engine and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from math import isfinite
from pathlib import Path

from numpy.random import SeedSequence, default_rng

from duetto.core.errors import ConfigError
from duetto.core.request import Request
from duetto.core.reuse import Reuse, TokenRange
from duetto.core.reuse_choice import ReuseChoice
from duetto.core.sampling_params import SamplingParams
from duetto.measure.arrivals import arrival_times
from duetto.measure.traces import (
    AS_RECORDED,
    MOONCAKE_BLOCK,
    TraceError,
    TraceFit,
    TraceRow,
    azure_rows,
    mooncake_rows,
    scaled_input,
)
from duetto.measure.workload import (
    MAX_LENGTH,
    MAX_REQUESTS,
    NO_PREFIX,
    Lengths,
    SharedPrefixes,
    check_num_requests,
    check_seed,
)

_ANY_SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True)
_UNSHARED = 2**40  # token ids from here on begin what only one request has
LONGEST_S = 1e9  # of a workload; beyond, a double has no room for the milliseconds of a latency


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come. Tokens of its prompt beyond its hash ids are like nobody else's."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()  # equal ids, equal tokens; one per `Traffic.hash_block`


@dataclass(frozen=True, slots=True)
class DrawnDocuments:
    """So many of them before each prompt, in any order, out of `count` that there are."""

    per_prompt: int
    length: int = MOONCAKE_BLOCK  # tokens of each
    count: int = 100

    def __post_init__(self) -> None:
        if not (1 <= self.length <= MAX_LENGTH and 1 <= self.per_prompt <= self.count):
            raise ConfigError(
                f"--random-documents {self.per_prompt} of {self.length} tokens, out of "
                f"{self.count}: a prompt has at least 1 and at most --random-num-documents, and "
                f"--random-document-len must be 1 to {MAX_LENGTH:,}"
            )
        if self.count > MAX_REQUESTS:
            raise ConfigError(
                f"--random-num-documents {self.count:,}: must be at most {MAX_REQUESTS:,}"
            )

    def draw(self, num_requests: int, seed: int) -> list[tuple[int, ...]]:
        """Which ones each prompt has, in their order."""
        rng = default_rng(SeedSequence(seed).spawn(3)[2])
        return [
            tuple(rng.choice(self.count, self.per_prompt, replace=False).tolist())
            for _ in range(num_requests)
        ]


@dataclass(frozen=True, slots=True)
class Traffic:
    arrivals: tuple[Arrival, ...]  # in order of time
    hash_block: int = MOONCAKE_BLOCK  # tokens per hash id
    notes: tuple[str, ...] = ()  # what a reader of the numbers must know
    # Of whole blocks with a hash id, which are segments then; None: nothing is marked.
    reuse: ReuseChoice | None = None

    def __post_init__(self) -> None:
        if self.arrivals and not self.arrivals[0].arrival_s >= 0:
            raise ConfigError(f"a request arrives at {self.arrivals[0].arrival_s} s, before 0")
        if self.arrivals and not self.arrivals[-1].arrival_s <= LONGEST_S:
            raise ConfigError(
                f"the last request would arrive after {self.arrivals[-1].arrival_s:.3g} s, at most "
                f"{LONGEST_S:.0e} can be simulated: raise --request-rate or --trace-speed"
            )

    @property
    def requests_per_s(self) -> float:
        """Mean rate of arrivals; 0 if all arrive at once."""
        duration = self.arrivals[-1].arrival_s - self.arrivals[0].arrival_s
        return (len(self.arrivals) - 1) / duration if duration else 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer together."""
        return max(a.num_prompt_tokens + a.num_output_tokens for a in self.arrivals)

    def first(self, count: int) -> "Traffic":
        return replace(self, arrivals=self.arrivals[:count])

    def faster(self, speed: float) -> "Traffic":
        """The same requests, `speed` times as fast. Raises ConfigError, naming the flag."""
        if not (speed > 0 and isfinite(speed)):
            raise ConfigError(f"--trace-speed {speed}: must be above 0")
        return self.at([a.arrival_s / speed for a in self.arrivals])

    def repeated(self, count: int) -> "Traffic":
        """So many times one after the other, at the same mean rate. What prompts share, they share
        within one of the times only: a second one finds nothing of the first in a cache."""
        own, last = self.arrivals, self.arrivals[-1].arrival_s
        period = last - own[0].arrival_s + (1 / self.requests_per_s if self.requests_per_s else 0)
        num_ids = 1 + max((h for a in own for h in a.hash_ids), default=0)
        arrivals = tuple(
            replace(
                a,
                arrival_s=a.arrival_s + k * period,
                hash_ids=tuple([h + k * num_ids for h in a.hash_ids]),
            )
            for k in range(count)
            for a in own
        )
        return replace(self, arrivals=arrivals)

    def at(self, times_s: Sequence[float]) -> "Traffic":
        """The same requests at other times, in order."""
        pairs = zip(self.arrivals, times_s, strict=True)
        return replace(self, arrivals=tuple(replace(a, arrival_s=time) for a, time in pairs))

    def request(self, index: int, *, max_tokens: int | None = None) -> Request:
        """The request that arrives as number `index`, with a prompt of made-up tokens."""
        arrival = self.arrivals[index]
        return Request(
            request_id=str(index),
            prompt_token_ids=self._prompt(index),
            sampling=_ANY_SAMPLING,
            max_tokens=arrival.num_output_tokens if max_tokens is None else max_tokens,
            seed=index,
            arrival_time=arrival.arrival_s,
            reuse=self._reuse(arrival),
        )

    def num_documents(self, arrival: Arrival) -> int:
        """Whole blocks with a hash id: texts that may stand anywhere."""
        return min(len(arrival.hash_ids), arrival.num_prompt_tokens // self.hash_block)

    def _reuse(self, arrival: Arrival) -> Reuse | None:
        if self.reuse is None:
            return None
        size = self.hash_block
        places = range(0, size * self.num_documents(arrival), size)
        return self.reuse.over(tuple([TokenRange(start, start + size) for start in places]))

    def _prompt(self, index: int) -> tuple[int, ...]:
        """Equal beginnings of hash ids give equal tokens, and only they do.

        The first token of a block says which it is; as KV depends on all tokens before, the others
        may be the same everywhere.
        """
        arrival = self.arrivals[index]
        size, rest = arrival.num_prompt_tokens, (0,) * (self.hash_block - 1)
        shared = tuple(chain.from_iterable((h, *rest) for h in arrival.hash_ids))[:size]
        own = size - len(shared)
        return (*shared, _UNSHARED + index, *((0,) * (own - 1))) if own else shared


def read_trace(
    file: Path, *, num_requests: int | None = None, fit: TraceFit = AS_RECORDED
) -> Traffic:
    """Azure's CSV or Mooncake's JSON lines, told apart by their first character.

    Raises TraceError with file and line for what is neither, for lengths below 1 and for a time
    that goes backwards.
    """
    try:
        with file.open(encoding="utf-8-sig") as text:
            beginning = text.read(4096).lstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(file, None, getattr(error, "strerror", None) or str(error)) from None
    if not beginning:
        raise TraceError(file, 1, "the file is empty; accepted: Azure's CSV, Mooncake's JSON lines")
    is_mooncake = beginning.startswith("{")
    rows = (mooncake_rows if is_mooncake else azure_rows)(file, num_requests)
    if rows[0].arrival_s < 0:  # azure's times are counted from the first
        raise TraceError(file, 1, f"timestamp is {rows[0].arrival_s * 1000:g}; accepted: 0 or more")
    return _fitted(rows, fit)


def _fitted(rows: Sequence[TraceRow], fit: TraceFit) -> Traffic:
    inputs = [scaled_input(row, fit) for row in rows]
    outputs = [fit.scaled(row.num_output) for row in rows]
    arrivals = tuple(
        Arrival(
            row.arrival_s,
            min(num_input, fit.max_input_len or num_input),
            min(num_output, fit.max_output_len or num_output),
            row.hash_ids,
        )
        for row, num_input, num_output in zip(rows, inputs, outputs, strict=True)
    )
    return Traffic(arrivals, fit.scaled(MOONCAKE_BLOCK), fit.notes(inputs, outputs))


def synthetic(
    num_requests: int,
    requests_per_s: float,
    *,
    input_lengths: Lengths,
    output_lengths: Lengths,
    burstiness: float = 1.0,
    prefixes: SharedPrefixes = NO_PREFIX,
    documents: DrawnDocuments | None = None,
    seed: int = 0,
) -> Traffic:
    """Requests at a rate: gaps of a gamma distribution, a Poisson process at burstiness 1, equal
    ones at inf. Lengths and arrivals have random streams of their own. Raises ConfigError.
    """
    check_num_requests(num_requests)
    check_seed(seed)
    of_lengths, of_prefixes = (default_rng(s) for s in SeedSequence(seed).spawn(2))
    inputs = input_lengths.draw(of_lengths, num_requests)
    outputs = output_lengths.draw(of_lengths, num_requests)
    which = of_prefixes.integers(prefixes.count, size=num_requests).tolist()
    times = timed(num_requests, requests_per_s, burstiness=burstiness, seed=seed)
    if documents is not None:
        drawn = documents.draw(num_requests, seed)
        arrivals = tuple(
            Arrival(time, len(ids) * documents.length + n, m, ids)
            for time, n, m, ids in zip(times, inputs, outputs, drawn, strict=True)
        )
        return Traffic(arrivals, documents.length)
    arrivals = tuple(
        Arrival(time, prefixes.length + n, m, (prefix,) if prefixes.length else ())
        for time, n, m, prefix in zip(times, inputs, outputs, which, strict=True)
    )
    return Traffic(arrivals, prefixes.length or MOONCAKE_BLOCK)


def timed(num_requests: int, requests_per_s: float, *, burstiness: float, seed: int) -> list[float]:
    """Times of arrivals at a rate, as `bench serve` draws them; equal gaps at burstiness inf."""
    if 0 < requests_per_s < num_requests / LONGEST_S:
        raise ConfigError(
            f"--request-rate {requests_per_s}: {num_requests} requests must arrive within "
            f"{LONGEST_S:.0e} s; beyond, nothing can be said of their latencies"
        )
    if burstiness == float("inf") and 0 < requests_per_s < float("inf"):
        gaps = [1 / requests_per_s] * num_requests
        return list(accumulate(gaps))
    return arrival_times(num_requests, requests_per_s, burstiness=burstiness, seed=seed)
