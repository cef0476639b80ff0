"""Whether KV is loaded or computed: what moves took, beside what a step should take.

Knows seconds for each block and the price of a step. What it says decides when an answer is there,
never what it is.
"""

from duetto.core.batch import BlockMove, MoveResult, MoveTarget, Tier
from duetto.core.shape import BatchShape, RequestShape, StepTime

GAIN = 0.2  # of the newest measurement
ONE_IN = 16  # of those that do not pay are loaded all the same: it may have been a slow moment

_Way = tuple[Tier, MoveTarget]


class TierPrices:
    """Learned from the reports of moves."""

    def __init__(self, step_time: StepTime | None = None) -> None:
        """Without the price of a step, loading is always taken to be cheaper."""
        self._step_time = step_time
        self._seconds: dict[_Way, float] = {}  # for a block
        self._num_declined = 0

    def observe(self, move: BlockMove, result: MoveResult) -> None:
        """A move has been reported."""
        if not result.num_done or not result.seconds > 0:
            return
        way, seconds = (move.source, move.target), result.seconds / result.num_done
        before = self._seconds.get(way, seconds)
        self._seconds[way] = before + GAIN * (seconds - before)

    def load_s(self, num_ram: int, num_disk: int) -> float:
        """Seconds to bring so many blocks into the arena; 0 for what was never measured."""
        to_arena = self._seconds.get(("ram", "arena"), 0.0)
        from_disk = self._seconds.get(("disk", "ram"), 0.0)
        return (num_ram + num_disk) * to_arena + num_disk * from_disk

    def pays(self, num_ram: int, num_disk: int, num_tokens: int, num_past: int) -> bool:
        """Whether loading blocks is cheaper than computing their tokens, after `num_past`."""
        if self._step_time is None:
            return True
        compute_s = self._step_time(BatchShape((RequestShape(num_tokens, num_past, 0),)))
        if self.load_s(num_ram, num_disk) < compute_s:
            return True
        self._num_declined += 1
        return self._num_declined % ONE_IN == 0
