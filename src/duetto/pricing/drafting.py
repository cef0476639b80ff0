"""What proposing takes, learned from the steps that did. Knows no proposer and no clock.

By method, the time of a step's proposing is taken as a sum of four amounts, each times a price that
is never negative: the call, its passes (the drafts of the request with most of them), its drafts,
and the tokens that it was sent. A method that was never asked costs nothing, and so is asked.
The first call is mostly the reading of what was missed: so what a time cannot be told to come from
is put down to tokens sent, then to drafts, passes and the call, in this order.
"""

from collections.abc import Mapping, Sequence

from duetto.core.shape import BatchShape
from duetto.pricing.learned import LearnedStepTime
from duetto.pricing.least_squares import Equations, Vector, solve

NUM_AMOUNTS = 4
MEMORY = 32  # steps after which an old one counts a third
MAX_RATIO = 4.0  # once a few are known, a step counts as at most so many times slower than expected
NUM_FREE = 4
NUM_KNOWN = 24  # steps of a method, after which one in ONE_IN is learned from
ONE_IN = 4
SWEEPS = 8


class _Method:
    __slots__ = ("equations", "num_seen", "prices")

    def __init__(self) -> None:
        self.equations = Equations(NUM_AMOUNTS)
        self.prices: Vector = [0.0] * NUM_AMOUNTS
        self.num_seen = 0

    def expected(self, amounts: Vector) -> float:
        return sum(map(float.__mul__, self.prices, amounts))


class LearnedDraftingTime:
    """One thread tells and asks."""

    def __init__(self) -> None:
        self._methods: dict[str, _Method] = {}

    def prices(self, method: str) -> tuple[float, float, float, float]:
        """Seconds per call, pass, draft and token sent."""
        found = self._methods.get(method)
        if found is None:
            return 0.0, 0.0, 0.0, 0.0
        sent, draft, each_pass, call = found.prices
        return call, each_pass, draft, sent

    def observe(self, work: Mapping[str, tuple[int, int, int]], seconds: float) -> None:
        """By method its passes, drafts and tokens sent, which all together took so long."""
        if not seconds > 0 or not self._is_due(work):
            return
        amounts = {
            method: [float(num_sent), float(num_drafts), float(num_passes), 1.0]
            for method, (num_passes, num_drafts, num_sent) in work.items()
        }
        methods = {m: self._methods[m] for m in work}
        expected = {m: methods[m].expected(amounts[m]) for m in work}
        total_s = sum(expected.values())
        for name, method in methods.items():
            known = total_s > 0 and expected[name] > 0
            share = expected[name] / total_s if known else 1.0 / len(work)
            self._learn(method, amounts[name], share * seconds, expected[name])

    def _is_due(self, work: Mapping[str, tuple[int, int, int]]) -> bool:
        """Once prices are known, most steps tell nothing new, and to learn takes time."""
        is_due = False
        for name in work:
            method = self._methods.setdefault(name, _Method())
            is_due = is_due or method.num_seen < NUM_KNOWN or method.num_seen % ONE_IN == 0
            method.num_seen += 1
        return is_due

    def _learn(self, method: _Method, amounts: Vector, seconds: float, expected_s: float) -> None:
        if method.num_seen > NUM_FREE and expected_s > 0:
            seconds = min(seconds, MAX_RATIO * expected_s)
        method.equations.add(amounts, seconds, expected_s or seconds, 1.0 - 1.0 / MEMORY)
        solve([method.equations], method.prices, SWEEPS)


class SpeculationPrices:
    """All that a policy of drafts asks (scheduler/worth.py, DraftPrices)."""

    def __init__(self, step_times: LearnedStepTime) -> None:
        self._step_times = step_times
        self._drafting = LearnedDraftingTime()

    def row_times(self, shape: BatchShape, num_more: int) -> Sequence[float]:
        return self._step_times.row_times(shape, num_more)

    def hopeful_row_times(self, shape: BatchShape, num_more: int) -> Sequence[float]:
        return self._step_times.hopeful_row_times(shape, num_more)

    def drafting_prices(self, method: str) -> tuple[float, float, float, float]:
        return self._drafting.prices(method)

    def observe_drafting(self, work: Mapping[str, tuple[int, int, int]], seconds: float) -> None:
        self._drafting.observe(work, seconds)
