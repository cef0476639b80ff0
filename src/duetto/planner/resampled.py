"""A measured load, drawn again for the simulator: lengths by their histograms, arrivals at random.

The same numbers give the same requests. Knows no servers.
"""

from dataclasses import dataclass, replace

from numpy.random import SeedSequence, default_rng

from duetto.planner.buckets import Buckets
from duetto.simulation.workload import Arrival, Traffic, timed

NUM_PREFIXES = 8  # that prompts share: so many conversations or documents are warm at a time
_SEED = 17


@dataclass(frozen=True, slots=True)
class MeasuredLoad:
    """Requests per second, and what they are like."""

    rate: float
    prompts: Buckets
    answers: Buckets
    hit_rate: float = 0.0  # the part of prompt tokens that was found in a cache

    @property
    def has_lengths(self) -> bool:
        return bool(self.prompts.count and self.answers.count)

    def at(self, rate: float) -> "MeasuredLoad":
        return replace(self, rate=rate)

    def traffic(self, num_requests: int, *, block: int, longest: int) -> Traffic:
        """So many of them. The measured part of each prompt, in whole blocks, is shared with an
        eighth of the others, so that it is found where one of them was computed before."""
        inputs, outputs, prefixes = (default_rng(s) for s in SeedSequence(_SEED).spawn(3))
        most = max(2, longest)
        prompts = inputs.permutation(self.prompts.spread(num_requests)).tolist()
        answers = outputs.permutation(self.answers.spread(num_requests)).tolist()
        which = prefixes.integers(NUM_PREFIXES, size=num_requests).tolist()
        times = timed(num_requests, self.rate, burstiness=1.0, seed=_SEED)
        arrivals = []
        for time, wanted, answer, prefix in zip(times, prompts, answers, which, strict=True):
            prompt = min(max(1, round(wanted)), most - 1)
            shared = int(self.hit_rate * prompt) // block
            first = prefix * (most // block + 1)
            arrivals.append(
                Arrival(
                    time,
                    prompt,
                    min(max(1, round(answer)), most - prompt),
                    tuple(range(first, first + shared)),
                )
            )
        return Traffic(tuple(arrivals), block)
