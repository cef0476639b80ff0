"""What it takes to decide about drafts, beside what they and steps take.

A look at what pays takes as long for a small model as for a large one, whose steps take a hundred
times as long. So it has a price too, measured by the clock that is handed in. Knows no requests.
"""

import math
from collections.abc import Callable

SHARE = 0.005  # of the time: for looks at what pays, where nothing does
LEAST_REST = 7  # steps between two such looks
MOST_REST = 255
WEIGHT = 1 / 8  # of a look in the running mean
MAX_RATIO = 2.0  # a look counts as at most so many times the mean: something else ran meanwhile


def no_time() -> float:
    """The clock where deciding takes no time: in a simulation, whose steps are priced."""
    return 0.0


class Thinking:
    """Seconds for a step's decisions, as a running mean over the steps in which there were any."""

    def __init__(self, clock: Callable[[], float] = no_time) -> None:
        self.clock = clock
        self.look_s = 0.0
        self.total_s = 0.0
        self._last_s = 0.0  # of `total_s`, when the last look ended

    def add(self, begun: float) -> None:
        """From `begun` until now something was decided, or learned."""
        self.total_s += self.clock() - begun

    def end_look(self, begun: float) -> None:
        """All is decided for a step: since `begun`, and what was added before."""
        self.add(begun)
        seconds, self._last_s = self.total_s - self._last_s, self.total_s
        if not self.look_s:
            self.look_s = seconds
        self.look_s += WEIGHT * (min(seconds, MAX_RATIO * self.look_s) - self.look_s)

    def rest(self, plain_s: float) -> int:
        """Steps that take `plain_s` each, between two looks at what pays, where nothing does."""
        num_steps = math.ceil(self.look_s / (SHARE * plain_s)) if plain_s else 0
        return min(max(num_steps, LEAST_REST), MOST_REST)
