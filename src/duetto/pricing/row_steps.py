"""What steps without chunks take, by their exact number of tokens. Knows no model or clock.

While weights are read, a few rows take as long as one; where a kernel's tile is full, one more row
takes as long as eight. No line through all sizes says that, and whether drafts pay depends on it.
So each size has its own running mean, which is the time of its steps less what their context took.
Between measured sizes the time is interpolated, beyond them it follows the line that is handed in,
and it never falls with size (isotonic regression: Barlow et al., 1972).

A machine with neighbours is slow for seconds at a time, and the size that runs then must not seem
dear for that. So how slow the machine is now, the level, is told apart from what sizes take beside
each other: what a step took more than was expected is put down to both, as their uncertainties say
(a Kalman filter: a size's uncertainty falls with its steps, the level's does not).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

MEMORY = 24  # steps of a size after which an old one counts a third
MAX_ROWS = 512  # larger steps are left to the line
MAX_RATIO = 1.5  # a step counts as at most so much slower or faster than was expected, once
NUM_FREE = 2  # steps of its size have counted as they were
LEAST_PART = 0.1  # of a step that is not its context
LEAST_HOPE = 0.6  # of what a size is thought to take that was never measured, and
LEAST_FALL = 0.9  # of what fewer rows take: a full tile may take less time than one with a rest
FEW_ROWS = 16  # for so many: of more a tile is a small part
LEVEL_DOUBT = 0.33  # how uncertain the level is before a step, in variances of one step's time
NEAR = 1.15  # a size is known if sizes so near to it are, on both sides
HOPE = 0.5  # what is hoped of a size weighs as much as so many of its steps
DOUBT = 1.0  # what was expected of a size weighs as much as so many of its steps


class RowSteps:
    """Seconds of a step by its number of rows, its context left out. One thread."""

    def __init__(self) -> None:
        self._level = 1.0  # how fast the machine is now; multiplies all means
        self._sizes: list[int] = []  # measured, ascending
        self._measured: dict[int, _Size] = {}
        self._prices = 0.0, 0.0  # of context: per attended pair, and per KV token read
        self._fitted: list[float] = []  # by size, without context and level; never falls
        self._hopes: list[float] = []
        self._time_of: dict[int, float] = {}  # the same as `_fitted`, to look one size up
        self._last_s = 0.0  # what the last step should have taken, without level
        self._last_asked = 0, 0, 0.0  # before and after a step is planned nearly the same is asked:
        self._last_told: list[float] = []  # forgotten when anything is learned

    @property
    def has_any(self) -> bool:
        return bool(self._sizes)

    def observe(
        self, num_rows: int, pairs: float, read: float, seconds: float, row_s: float
    ) -> None:
        """A step of so many rows took so long, and had so much context; `row_s` is the line's slope
        where it is not measured."""
        if num_rows > MAX_ROWS:
            return
        pair_s, read_s = self._prices
        level, context_s = self._level, pair_s * pairs + read_s * read
        expected = self.seconds(num_rows, row_s) + context_s if self._sizes else seconds
        size = self._measured.get(num_rows)
        if size is None:
            size = self._measured[num_rows] = _Size()
            self._sizes.insert(bisect_left(self._sizes, num_rows), num_rows)
            if len(self._sizes) > 1:  # one step alone may have been a slow one
                seconds = (seconds + DOUBT * expected) / (1.0 + DOUBT)
        elif size.count >= NUM_FREE:
            seconds = min(max(seconds, expected / MAX_RATIO), expected * MAX_RATIO)
        gain = 1.0
        if size.count and expected > 0:
            doubt = 1.0 / size.count
            gain = doubt / (doubt + LEVEL_DOUBT + 1.0)
            size.add(pairs, read, seconds / self._level, gain)
            self._level *= (seconds / expected) ** (gain * LEVEL_DOUBT / doubt)
        else:
            size.add(pairs, read, seconds / self._level, 1.0)
        self._last_s = expected / level
        self._fit()

    def follow(self, seconds: float) -> None:
        """Another step like the last one, which tells of the level only."""
        expected = self._last_s * self._level
        if expected > 0:
            seconds = min(max(seconds, expected / MAX_RATIO), expected * MAX_RATIO)
            self._level *= (seconds / expected) ** (LEVEL_DOUBT / (LEVEL_DOUBT + 1.0))
            self._last_asked = 0, 0, 0.0

    def price_context(self, pair_s: float, read_s: float) -> None:
        """What context takes, by the line; it may change as that is learned."""
        if (pair_s, read_s) != self._prices:
            self._prices = pair_s, read_s
            self._fit()

    def seconds(self, num_rows: int, row_s: float) -> float:
        time = self._time_of.get(num_rows)
        if time is None:
            time = _between(num_rows, self._sizes, self._fitted, row_s / self._level)
        return self._level * time

    def many(self, start: int, stop: int, row_s: float) -> list[float]:
        """`seconds` of start .. stop - 1 rows."""
        last_start, last_stop, last_row_s = self._last_asked
        if last_start != start or last_stop < stop or last_row_s != row_s:
            self._last_asked = start, stop, row_s
            self._last_told = self._many(start, stop, row_s)
        return self._last_told[: stop - start]

    def _many(self, start: int, stop: int, row_s: float) -> list[float]:
        sizes, times, level = self._sizes, self._fitted, self._level
        found: list[float] = []
        first, index = start, bisect_right(sizes, start)
        while first < stop:  # one line between two measured sizes after the other
            last = min(stop, sizes[index]) if index < len(sizes) else stop
            if not index:
                found += [self.seconds(n, row_s) for n in range(first, last)]
            elif last - first == 1 and sizes[index - 1] == first:
                found.append(level * times[index - 1])
            else:
                left, time = sizes[index - 1], times[index - 1]
                slope = row_s / level
                if index < len(sizes):
                    slope = (times[index] - time) / (sizes[index] - left)
                found += [level * (time + slope * (n - left)) for n in range(first, last)]
            first, index = last, index + 1
        return found

    def hopeful(self, start: int, stop: int, row_s: float) -> list[float]:
        """The least that so many rows may take: as much as a smaller size that is well measured,
        but not less than a part of what they are thought to take."""
        sizes, hopes, level = self._sizes, self._hopes, self._level
        found = self.many(start, stop, row_s)
        index, least = bisect_right(sizes, start) - 1, found[0]
        for i, thought in enumerate(found):
            num_rows = start + i
            if index + 1 < len(sizes) and sizes[index + 1] == num_rows:
                index += 1
            if index < 0:
                continue
            before, hope = sizes[index], level * hopes[index]
            if before == num_rows:
                found[i] = hope
            elif (
                num_rows > NEAR * before
                or sizes[-1] < num_rows
                or sizes[index + 1] > NEAR * num_rows
            ):
                fall = LEAST_FALL if num_rows <= FEW_ROWS else 1.0
                hope = max(fall * hope, LEAST_HOPE * thought, least)
                found[i] = min(thought, hope)
        return found

    def _fit(self) -> None:
        """Pool neighbours that fall with size, weighted by their counts."""
        self._last_asked = 0, 0, 0.0
        pools: list[list[float]] = []  # mean, weight, how many sizes
        pair_s, read_s = self._prices
        for num_rows in self._sizes:
            size = self._measured[num_rows]
            alone = size.seconds - (pair_s * size.pairs + read_s * size.read) / self._level
            pools.append([max(alone, LEAST_PART * size.seconds), size.count, 1.0])
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                mean, weight, num = pools.pop()
                last = pools[-1]
                last[0] = (last[0] * last[1] + mean * weight) / (last[1] + weight)
                last[1] += weight
                last[2] += num
        self._fitted = [mean for mean, _, num in pools for _ in range(int(num))]
        self._time_of = dict(zip(self._sizes, self._fitted, strict=True))
        self._hopes, hope = [], 0.0
        for num_rows, fitted in zip(self._sizes, self._fitted, strict=True):
            count = self._measured[num_rows].count
            hope = hope + (fitted - hope) * count / (count + HOPE) if self._hopes else fitted
            self._hopes.append(hope)


class _Size:
    """Running means over the steps of one number of rows."""

    __slots__ = ("count", "pairs", "read", "seconds")

    def __init__(self) -> None:
        self.count = self.pairs = self.read = self.seconds = 0.0

    def add(self, pairs: float, read: float, seconds: float, gain: float) -> None:
        self.count = min(self.count + 1.0, MEMORY - 1)
        self.pairs += gain * (pairs - self.pairs)
        self.read += gain * (read - self.read)
        self.seconds += gain * (seconds - self.seconds)


def _between(num_rows: int, sizes: Sequence[int], times: Sequence[float], slope: float) -> float:
    """The time of a size that was not measured."""
    index = bisect_left(sizes, num_rows)
    if index == len(sizes):
        return times[-1] + slope * (num_rows - sizes[-1])
    size, time = sizes[index], times[index]
    if not index:  # half the rows take at least half the time
        return max(time - slope * (size - num_rows), time * num_rows / size)
    part = (num_rows - sizes[index - 1]) / (size - sizes[index - 1])
    return times[index - 1] + part * (time - times[index - 1])
