"""The time of a step, learned from the steps that ran. Knows no model, hardware or clock.

A step's time is taken as a sum of five amounts, each times a price that is never negative: one
step, its tokens, its rows of logits, its query-key pairs, and the KV tokens it reads. The prices
are the non-negative least squares of relative errors over the measured steps (Lawson and Hanson,
1974, ch. 23; solved by coordinate descent), begun from another price. Equal measurements give
equal prices, bit for bit. What is learned decides when a prompt's tokens are computed, never which
tokens are answered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from duetto.core.shape import BatchShape, RequestShape

NUM_AMOUNTS = 5
MEMORY = 24  # steps of one size after which an old one counts a third
NUM_TO_SCALE = 32  # first steps, which say how fast this machine is beside what the start says
SWEEPS = 4  # of coordinate descent at a time; what is left is done the next time
SOLVE_EVERY = 4  # steps, once the first have been learned from
NUM_ALIKE = 16  # steps of as many tokens in a row, after which one in ONE_IN is learned from:
ONE_IN = 8  # they tell nothing new, and to learn takes as long as all else that decides a step
GUESS_WEIGHT = 0.05  # of what the start says of a size that was not measured, beside a step
MAX_RATIO = 8.0  # a step may count as this many times slower than predicted, not more
ON_TIME = 0.95  # of the steps with prompts: their part that ends by `late_time`
LATE_GAIN = 0.01  # how much of a price one step with a prompt may change that by
MAX_LATENESS = 1.25
Row = list[float]


@dataclass(frozen=True, slots=True)
class _Equations:
    """The normal equations of a least squares: matrix · prices = right."""

    matrix: list[Row] = field(default_factory=lambda: [[0.0] * NUM_AMOUNTS for _ in range(5)])
    right: Row = field(default_factory=lambda: [0.0] * NUM_AMOUNTS)

    def add(self, amounts: Row, seconds: float, predicted: float, keep: float) -> None:
        """One more step, for which amounts · prices should be `seconds`; old ones fade.

        Errors are relative: to what was predicted as much as to what was measured, so that neither
        a step in which the machine slept nor an old fast one outweighs the others.
        """
        weight = 1.0 / (seconds * predicted)
        for i, amount in enumerate(amounts):
            scale, row = weight * amount, self.matrix[i]
            self.matrix[i] = [keep * m + scale * a for m, a in zip(row, amounts, strict=True)]
            self.right[i] = keep * self.right[i] + scale * seconds

    def slower(self, factor: float, weight: float) -> "_Equations":
        """As if every step had taken `factor` times as long, and counted `weight` times."""
        return _Equations(
            [[weight * m / factor**2 for m in row] for row in self.matrix],
            [weight * r / factor for r in self.right],
        )


class LearnedStepTime:
    """A `step_time` that gets better with each `observe`. One thread calls both."""

    def __init__(self, start: Callable[[BatchShape], float] | None = None) -> None:
        """`start` prices steps of sizes that were not measured; its scale is corrected by those
        that were. None: the first steps say all."""
        self._start = start
        self._started: dict[int, _Equations] = {}  # by size
        self._measured: dict[int, _Equations] = {}
        self._slowness = 1.0  # measured over started, geometric mean
        self._prices: Row = [0.0] * NUM_AMOUNTS
        self._last_tokens = self._num_alike = 0  # in a row
        self.num_observed = 0
        self._lateness = 1.0
        if start is not None:
            for shape in _PROBES:
                time_s = start(shape)
                self._at(self._started, shape).add(_amounts(shape), time_s, time_s, 1.0)
            self._solve(200)

    @property
    def prices(self) -> tuple[float, ...]:
        """Seconds per step, token, logit row, attended pair and KV token read."""
        return tuple(self._prices)

    def step_time(self, shape: BatchShape) -> float:
        """Seconds that a step of this shape should take; more work never takes less."""
        return sum(map(float.__mul__, self._prices, _amounts(shape)))

    def late_time(self, shape: BatchShape) -> float:
        """Seconds by which all but one in twenty steps with prompts end: `step_time`, and what else
        runs on this machine. The quantile is followed step by step (Robbins and Monro, 1951)."""
        return self._lateness * self.step_time(shape)

    def has_measured(self, shape: BatchShape) -> bool:
        """Whether steps of about this many tokens have been learned from."""
        return shape.num_tokens.bit_length() in self._measured

    def observe(self, shape: BatchShape, seconds: float) -> None:
        """A step of this shape has taken so long."""
        if not shape.requests or not seconds > 0 or self._is_nothing_new(shape.num_tokens):
            return
        amounts = _amounts(shape)
        predicted = sum(map(float.__mul__, self._prices, amounts)) or seconds
        if self.num_observed >= NUM_TO_SCALE:
            if shape.num_tokens > len(shape.requests):
                self._follow_lateness(seconds > self._lateness * predicted)
            seconds = min(seconds, MAX_RATIO * predicted)  # the machine was asleep, say
        elif self._start is not None:
            ratio = seconds / self._start(shape)
            self._slowness *= (ratio / self._slowness) ** (1.0 / (self.num_observed + 1))
        # Steps of one size fade as others of the same size come, so a thousand next tokens do not
        # make the model forget what a chunk took.
        self._at(self._measured, shape).add(amounts, seconds, predicted, 1.0 - 1.0 / MEMORY)
        self.num_observed += 1
        if self.num_observed <= NUM_TO_SCALE or self.num_observed % SOLVE_EVERY == 0:
            self._solve(SWEEPS)

    def _follow_lateness(self, is_late: bool) -> None:
        lateness = self._lateness + LATE_GAIN * (ON_TIME - (not is_late))
        self._lateness = min(max(lateness, 1.0), MAX_LATENESS)

    def _is_nothing_new(self, num_tokens: int) -> bool:
        self._num_alike = self._num_alike + 1 if num_tokens == self._last_tokens else 0
        self._last_tokens = num_tokens
        return self._num_alike > NUM_ALIKE and self._num_alike % ONE_IN != 0

    def _at(self, table: dict[int, _Equations], shape: BatchShape) -> _Equations:
        return table.setdefault(shape.num_tokens.bit_length(), _Equations())

    def _solve(self, sweeps: int) -> None:
        """Minimise the squared relative errors over prices >= 0, one price after the other."""
        known = [*self._measured.values()]
        known += [
            equations.slower(self._slowness, GUESS_WEIGHT)
            for size, equations in self._started.items()
            if size not in self._measured
        ]
        matrix = [_total([each.matrix[i] for each in known]) for i in range(NUM_AMOUNTS)]
        right, prices = _total([each.right for each in known]), self._prices
        for _ in range(sweeps):
            for i, row in enumerate(matrix):
                if row[i] > 0:
                    rest = right[i] - sum(map(float.__mul__, row, prices)) + row[i] * prices[i]
                    prices[i] = max(0.0, rest / row[i])


def _total(rows: Sequence[Row]) -> Row:
    return [sum(column) for column in zip(*rows, strict=True)]


def _amounts(shape: BatchShape) -> Row:
    tokens = rows = pairs = read = 0
    for request in shape.requests:
        new, past = request.num_new, request.num_past
        tokens += new
        rows += request.num_logit_rows
        pairs += new * past + new * (new + 1) // 2
        read += new + past
    return [1.0, float(tokens), float(rows), float(pairs), float(read)]


def _even(num_requests: int, num_new: int, num_past: int) -> BatchShape:
    return BatchShape((RequestShape(num_new, num_past),) * num_requests)


_PROBES = (  # steps like those that will be asked about
    *(_even(n, 1, past) for n in (1, 4, 16, 64) for past in (32, 512, 2048)),
    *(_even(1, new, past) for new in (8, 32, 128, 512) for past in (0, 512, 2048)),
    *(BatchShape((*_even(8, 1, 512).requests, RequestShape(n, 256, 0))) for n in (16, 64, 256)),
)
