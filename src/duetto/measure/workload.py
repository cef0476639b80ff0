"""What to ask of a server, and when: synthetic workloads and the types that all readers share.

Everything is a function of its seed. Knows no server, no tokenizer and no clock; traces.py reads
recorded workloads into the same types, arrivals.py gives them their times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng

from duetto.core.errors import ConfigError

LengthKind = Literal["fixed", "uniform", "lognormal"]
# Far above all that is measured, and below what would fill a machine's memory. A slip of a unit
# (1G for 1k) is to be a refusal.
MAX_LENGTH = 2**24  # tokens of one prompt or answer
MAX_REQUESTS = 10_000_000
MAX_PROMPT_TOKENS = 2**28  # of all prompts together, where all are made before the first is sent


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request to send: its prompt as token ids or as text (exactly one of the two).

    `num_prompt_tokens` is the length asked for, by default that of the ids; None if nobody knows.
    """

    num_output_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_text: str | None = None
    num_prompt_tokens: int | None = None
    arrival_s: float = 0.0  # after the start of the run

    def __post_init__(self) -> None:
        if (self.prompt_token_ids is None) == (self.prompt_text is None):
            raise ValueError("a workload request has either prompt_token_ids or prompt_text")
        if self.num_prompt_tokens is None and self.prompt_token_ids is not None:
            object.__setattr__(self, "num_prompt_tokens", len(self.prompt_token_ids))


@dataclass(frozen=True, slots=True)
class Workload:
    requests: tuple[WorkloadRequest, ...]
    notes: tuple[str, ...] = ()  # what a reader of the numbers must know: cuts, rows left out

    def with_arrivals(self, arrivals_s: Sequence[float]) -> "Workload":
        """The same requests at other times, one for each."""
        pairs = zip(self.requests, arrivals_s, strict=True)
        timed = tuple(replace(request, arrival_s=float(time)) for request, time in pairs)
        return replace(self, requests=timed)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, all 1 or more, with the given mean.

    fixed: always `mean`. uniform: every whole number from floor(mean * (1 - spread)) to
    ceil(mean * (1 + spread)), vLLM's --random-range-ratio. lognormal: `spread` is the standard
    deviation of the logarithm; rounding and the limits shift the mean a little.
    """

    mean: int
    kind: LengthKind = "fixed"
    spread: float = 0.0
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.mean < 1 or (self.maximum is not None and self.maximum < 1):
            raise ConfigError(f"a length of {self.mean} tokens: lengths must be 1 or more")
        if self.mean > MAX_LENGTH:
            raise ConfigError(
                f"a length of {self.mean:,} tokens: lengths must be at most {MAX_LENGTH:,}"
            )
        if not self.spread >= 0 or (self.kind == "uniform" and self.spread >= 1):
            accepted = "from 0 to below 1" if self.kind == "uniform" else "0 or more"
            raise ConfigError(
                f"--random-range-ratio {self.spread}: must be {accepted} for {self.kind} lengths"
            )

    def draw(self, rng: Generator, count: int) -> list[int]:
        if self.kind == "fixed":
            drawn = np.full(count, self.mean)
        elif self.kind == "uniform":
            low, high = self.mean * (1 - self.spread), self.mean * (1 + self.spread)
            drawn = rng.integers(int(np.floor(low)), int(np.ceil(high)), count, endpoint=True)
        else:
            # A lognormal's mean is exp(mu + sigma²/2).
            mu = np.log(self.mean) - self.spread**2 / 2
            drawn = np.rint(rng.lognormal(mu, self.spread, count)).astype(np.int64)
        return [int(length) for length in np.clip(drawn, 1, self.maximum or MAX_LENGTH)]


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """`length` tokens before each prompt, one of `count` such prefixes drawn for each request."""

    length: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.length < 0 or self.count < 1:
            raise ConfigError(
                f"--random-prefix-len {self.length} with --random-num-prefixes {self.count}: "
                f"the length must be 0 or more and the number 1 or more"
            )
        if self.length > MAX_LENGTH or self.count > MAX_REQUESTS:
            raise ConfigError(
                f"--random-prefix-len {self.length} with --random-num-prefixes {self.count}: "
                f"the length must be at most {MAX_LENGTH:,} and the number {MAX_REQUESTS:,}"
            )


NO_PREFIX = SharedPrefixes()


def random_workload(
    num_requests: int,
    *,
    input_lengths: Lengths,
    output_lengths: Lengths,
    vocab_size: int,
    prefixes: SharedPrefixes = NO_PREFIX,
    seed: int = 0,
) -> Workload:
    """Random token ids below `vocab_size`. All arrive at 0; see arrivals.py.

    Lengths, prefixes and tokens have random streams of their own, so that changing one
    leaves the others as they were. Raises ConfigError, naming the flag.
    """
    check_num_requests(num_requests)
    check_vocab_size(vocab_size)
    check_seed(seed)
    of_lengths, of_prefixes, of_tokens = (default_rng(s) for s in SeedSequence(seed).spawn(3))
    inputs = input_lengths.draw(of_lengths, num_requests)
    outputs = output_lengths.draw(of_lengths, num_requests)
    num_tokens = sum(inputs) + prefixes.length * (prefixes.count + num_requests)
    if num_tokens > MAX_PROMPT_TOKENS:
        raise ConfigError(
            f"{num_requests:,} prompts of {num_tokens:,} tokens together: at most "
            f"{MAX_PROMPT_TOKENS:,} are made; ask for fewer or shorter ones"
        )
    shared = [_random_ids(of_prefixes, prefixes.length, vocab_size) for _ in range(prefixes.count)]
    which = of_prefixes.integers(prefixes.count, size=num_requests)
    return Workload(
        tuple(
            WorkloadRequest(
                prompt_token_ids=shared[prefix] + _random_ids(of_tokens, num_input, vocab_size),
                num_output_tokens=num_output,
            )
            for num_input, num_output, prefix in zip(inputs, outputs, which, strict=True)
        )
    )


def check_num_requests(
    count: int, flag: str = "--num-prompts", *, maximum: int = MAX_REQUESTS
) -> None:
    if count < 1:
        raise ConfigError(f"{flag} {count}: must be 1 or more")
    if count > maximum:
        raise ConfigError(f"{flag} {count:,}: must be at most {maximum:,}")


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < 1:
        raise ConfigError(f"--random-vocab-size {vocab_size}: must be 1 or more")


def check_seed(seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")


def _random_ids(rng: Generator, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(vocab_size, size=count).tolist())
