"""The time of a step, learned from the steps that ran. Knows no model, hardware or clock.

A step's time is taken as a sum of five amounts, each times a price that is never negative: one
step, its tokens, its rows of logits, its query-key pairs, and the KV tokens it reads. The prices
are the non-negative least squares of relative errors over the measured steps (Lawson and Hanson,
1974, ch. 23; solved by coordinate descent), begun from another price. Equal measurements give
equal prices, bit for bit. Steps without chunks are priced by what steps of their number of tokens
took (row_steps.py), their context by these prices: whether drafts pay depends on a few rows. What
is learned decides when tokens are computed, never which tokens are answered.
"""

from collections.abc import Callable

from duetto.core.shape import BatchShape, RequestShape
from duetto.pricing.least_squares import Equations, Vector, solve
from duetto.pricing.reuse import LookShare
from duetto.pricing.row_steps import RowSteps

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
ALL_LAYERS = LookShare(1.0, 1.0)


class LearnedStepTime:
    """A `step_time` that gets better with each `observe`. One thread calls both."""

    def __init__(
        self,
        start: Callable[[BatchShape], float] | None = None,
        look_share: LookShare = ALL_LAYERS,
    ) -> None:
        """`start` prices steps of sizes that were not measured; its scale is corrected by those
        that were. None: the first steps say all. Tokens of looks at deviations count as
        `look_share` of others."""
        self._start = start
        self._look_share = look_share
        self._started: dict[int, Equations] = {}  # by size
        self._measured: dict[int, Equations] = {}
        self._row_steps = RowSteps()
        self._slowness = 1.0  # measured over started, geometric mean
        self._prices: Vector = [0.0] * NUM_AMOUNTS
        self._last_tokens = self._num_alike = 0  # in a row
        self._was_rows = False  # the last step that was learned from had no chunks
        self.num_observed = 0
        self._lateness = 1.0
        if start is not None:
            for shape in _PROBES:
                time_s = start(shape)
                amounts = self._amounts(shape)
                _at(self._started, amounts).add(amounts, time_s, time_s, 1.0)
            self._solve(200)

    @property
    def prices(self) -> tuple[float, ...]:
        """Seconds per step, token, logit row, attended pair and KV token read."""
        return tuple(self._prices)

    def step_time(self, shape: BatchShape) -> float:
        """Seconds that a step of this shape should take; more work never takes less."""
        amounts = self._amounts(shape)
        has_any = self._row_steps.has_any
        if has_any and amounts[1] == amounts[2]:  # nearly always, before each step
            return self._rows_s(amounts)
        seconds = sum(map(float.__mul__, self._prices, amounts))
        if not has_any:
            return seconds
        # A chunk is beyond what was measured row by row, but takes no time off its streams.
        streams = BatchShape(tuple([r for r in shape.requests if r.num_new == r.num_logit_rows]))
        return max(seconds, self._rows_s(self._amounts(streams))) if streams.requests else seconds

    def row_times(self, shape: BatchShape, num_more: int) -> list[float]:
        """`step_time` with 0, 1, ... `num_more` drafts in addition, each with the mean context of
        those requests that compute one token."""
        return self._more_rows(shape, num_more, self._row_steps.many)

    def hopeful_row_times(self, shape: BatchShape, num_more: int) -> list[float]:
        """As `row_times`, but the least that it may be, where few steps of a size were measured."""
        return self._more_rows(shape, num_more, self._row_steps.hopeful)

    def late_time(self, shape: BatchShape) -> float:
        """Seconds by which all but one in twenty steps with prompts end: `step_time`, and what else
        runs on this machine. The quantile is followed step by step (Robbins and Monro, 1951)."""
        return self._lateness * self.step_time(shape)

    def has_measured(self, shape: BatchShape) -> bool:
        """Whether steps of about this many tokens have been learned from. Any thread may ask."""
        return _size(self._amounts(shape)) in self._measured

    def observe(self, shape: BatchShape, seconds: float) -> None:
        """A step of this shape has taken so long."""
        if not shape.requests or not seconds > 0:
            return
        if self._is_nothing_new(shape.num_tokens):
            if self._was_rows:
                self._row_steps.follow(seconds)
            return
        amounts = self._amounts(shape)
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
        _at(self._measured, amounts).add(amounts, seconds, predicted, 1.0 - 1.0 / MEMORY)
        self._was_rows = amounts[1] == amounts[2]
        if self._was_rows:
            self._row_steps.observe(int(amounts[1]), amounts[3], amounts[4], seconds, self._row_s)
        self.num_observed += 1
        if self.num_observed <= NUM_TO_SCALE or self.num_observed % SOLVE_EVERY == 0:
            self._solve(SWEEPS)

    def _amounts(self, shape: BatchShape) -> Vector:
        requests, tokens = shape.requests, 0.0
        rows = pairs = read = 0.0
        if requests and requests.count(requests[0]) == len(requests):  # as a policy of drafts asks
            requests, count = requests[:1], float(len(requests))
        else:
            count = 1.0
        for new, past, num_rows, is_short in requests:
            own_pairs, own_read = new * past + new * (new + 1) // 2, new + past
            if is_short:
                tokens += self._look_share.compute * new
                pairs += self._look_share.context * own_pairs
                read += self._look_share.context * own_read
                continue
            tokens += new
            rows += num_rows
            pairs += own_pairs
            read += own_read
        return [1.0, count * tokens, count * rows, count * pairs, count * read]

    @property
    def _row_s(self) -> float:
        """One more row by the line, without its context."""
        return self._prices[1] + self._prices[2]

    def _context_s(self, amounts: Vector) -> float:
        return self._prices[3] * amounts[3] + self._prices[4] * amounts[4]

    def _rows_s(self, amounts: Vector) -> float:
        prices = self._prices  # every step asks: in as few calls as may be
        rows_s = self._row_steps.seconds(int(amounts[1]), prices[1] + prices[2])
        return rows_s + (prices[3] * amounts[3] + prices[4] * amounts[4])

    def _more_rows(
        self, shape: BatchShape, num_more: int, rows_s: Callable[[int, int, float], list[float]]
    ) -> list[float]:
        amounts, prices = self._amounts(shape), self._prices
        tokens = int(amounts[1])
        pasts = [r.num_past for r in shape.requests if r.num_new == 1]
        past = sum(pasts) / len(pasts) if pasts else 0.0
        context_s = prices[3] * (past + 1.0) + prices[4]
        if amounts[1] == amounts[2] and self._row_steps.has_any:
            times = rows_s(tokens, tokens + num_more + 1, self._row_s)
            start_s = self._context_s(amounts)
            return [start_s + t + i * context_s for i, t in enumerate(times)]
        start_s, more_s = self.step_time(shape), self._row_s + context_s
        return [start_s + i * more_s for i in range(num_more + 1)]

    def _follow_lateness(self, is_late: bool) -> None:
        lateness = self._lateness + LATE_GAIN * (ON_TIME - (not is_late))
        self._lateness = min(max(lateness, 1.0), MAX_LATENESS)

    def _is_nothing_new(self, num_tokens: int) -> bool:
        self._num_alike = self._num_alike + 1 if num_tokens == self._last_tokens else 0
        self._last_tokens = num_tokens
        return self._num_alike > NUM_ALIKE and self._num_alike % ONE_IN != 0

    def _solve(self, sweeps: int) -> None:
        """Minimise the squared relative errors over prices >= 0, one price after the other."""
        known = [*self._measured.values()]
        known += [
            equations.slower(self._slowness, GUESS_WEIGHT)
            for size, equations in self._started.items()
            if size not in self._measured
        ]
        solve(known, self._prices, sweeps)
        self._row_steps.price_context(self._prices[3], self._prices[4])


def _size(amounts: Vector) -> int:
    return int(amounts[1]).bit_length()


def _at(table: dict[int, Equations], amounts: Vector) -> Equations:
    return table.setdefault(_size(amounts), Equations(NUM_AMOUNTS))


def _even(num_requests: int, num_new: int, num_past: int) -> BatchShape:
    return BatchShape((RequestShape(num_new, num_past),) * num_requests)


_PROBES = (  # steps like those that will be asked about
    *(_even(n, 1, past) for n in (1, 4, 16, 64) for past in (32, 512, 2048)),
    *(_even(1, new, past) for new in (8, 32, 128, 512) for past in (0, 512, 2048)),
    *(BatchShape((*_even(8, 1, 512).requests, RequestShape(n, 256, 0))) for n in (16, 64, 256)),
)
