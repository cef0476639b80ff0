"""Histograms with buckets, as Prometheus has them: differences, quantiles, and samples to replay.

Knows no names of metrics and no text format.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isinf


@dataclass(frozen=True, slots=True)
class Buckets:
    """`counts[i]` values are above `bounds[i - 1]` and at most `bounds[i]`; the last bound is inf.
    Within a bucket values are taken to be spread evenly."""

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    total: float = 0.0  # of all values: the mean is exact, whatever the buckets

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def since(self, before: "Buckets") -> "Buckets":
        """What was added after `before`; everything, if this began again since."""
        if before.bounds != self.bounds or before.count > self.count:
            return self
        counts = [max(0.0, new - old) for new, old in zip(self.counts, before.counts, strict=True)]
        return Buckets(self.bounds, tuple(counts), max(0.0, self.total - before.total))

    def plus(self, other: "Buckets") -> "Buckets":
        """Of both. Servers whose models have other lengths have other buckets: each value is
        then counted at the upper bound that both have, or at inf."""
        if not self.bounds or not other.bounds:
            return self if self.bounds else other
        bounds = tuple(sorted({*self.bounds} & {*other.bounds}))
        counts = [0.0] * len(bounds)
        for one in (self, other):
            for bound, count in zip(one.bounds, one.counts, strict=True):
                counts[bisect_left(bounds, bound)] += count
        return Buckets(bounds, tuple(counts), self.total + other.total)

    def quantile(self, part: float) -> float | None:
        """None of an empty one. Beyond the last finite bound nothing is known but that bound."""
        if not self.count:
            return None
        left = part * self.count
        for place, count in enumerate(self.counts):
            if count and left <= count:
                low, high = self._range(place)
                return low + (high - low) * left / count
            left -= count
        return self._range(len(self.counts) - 1)[1]

    def share_within(self, limit: float) -> float | None:
        """The part of the values that is at most `limit`; None of an empty one."""
        if not self.count:
            return None
        within = 0.0
        for place, count in enumerate(self.counts):
            low, high = self._range(place)
            if isinf(self.bounds[place]):
                continue  # above all that is known: never within
            if high <= limit:
                within += count
            elif low < limit:
                within += count * (limit - low) / (high - low)
        return within / self.count

    def spread(self, count: int) -> list[float]:
        """So many values, at equal parts of the distribution, in order; scaled to its mean."""
        values = [self.quantile((i + 0.5) / count) or 0.0 for i in range(count)]
        mean, own = self.mean or 0.0, sum(values) / count
        return [value * mean / own for value in values] if own and mean else values

    def _range(self, place: int) -> tuple[float, float]:
        low = self.bounds[place - 1] if place else 0.0
        high = self.bounds[place]
        return (low, low) if isinf(high) else (low, high)


def from_cumulative(pairs: Sequence[tuple[float, float]], total: float) -> Buckets:
    """Of (upper bound, values at most that), as the text format has them, in any order. Raises
    ValueError for what falls or has no inf."""
    ordered = sorted(pairs)
    bounds = tuple(bound for bound, _ in ordered)
    if not bounds or bounds[-1] != inf or len(set(bounds)) < len(bounds):
        raise ValueError("a histogram needs bounds that differ, the last of them +Inf")
    upto = [count for _, count in ordered]
    counts = [new - old for new, old in zip(upto, [0.0, *upto], strict=False)]
    if min(counts) < 0:
        raise ValueError("a histogram's counts must not fall")
    return Buckets(bounds, tuple(counts), total)
