"""The shape of one step's batch: how many tokens, after how many, and how many logits are wanted.

All that a price needs to know of a batch. Knows no model, no hardware and no time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RequestShape(NamedTuple):
    """What one request brings to a step. A tuple, as every step makes as many as it has requests:
    a frozen dataclass takes four times as long to make."""

    num_new: int  # tokens to compute
    num_past: int  # tokens before them, with KV in the cache
    num_logit_rows: int = 1  # of the new tokens, those whose logits are wanted
    is_short: bool = False  # a look at deviations: layer 0, and layer 1 up to its KV (batch.Look)

    def attended_pairs(self, window: int | None) -> int:
        """Query-key pairs under the causal mask, exactly. `window` counts the query itself."""
        q, p = self.num_new, self.num_past
        if window is None:
            return q * p + q * (q + 1) // 2
        # The first `short` queries see less than a whole window: p+1, p+2, ...
        short = min(q, max(0, window - p))
        return short * p + short * (short + 1) // 2 + (q - short) * window

    def read_tokens(self, window: int | None) -> int:
        """Tokens whose KV attention must read at least once."""
        total = self.num_past + self.num_new
        return total if window is None else min(total, window - 1 + self.num_new)


def shape_at(positions: Sequence[int], num_logit_rows: int) -> RequestShape:
    """Tokens at positions with gaps between them, as the chunk that attends to as many pairs (but
    for the rounding of the mean)."""
    size = len(positions)
    pairs = sum(positions) + size
    return RequestShape(size, (pairs - size * (size + 1) // 2) // size, num_logit_rows)


@dataclass(frozen=True, slots=True)
class BatchShape:
    requests: tuple[RequestShape, ...]

    @property
    def num_tokens(self) -> int:
        return sum([r.num_new for r in self.requests])

    @property
    def num_logit_rows(self) -> int:
        return sum(r.num_logit_rows for r in self.requests)


EMPTY = BatchShape(())
StepTime = Callable[[BatchShape], float]  # seconds; of the shape alone, and more work never less
