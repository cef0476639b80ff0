"""The shape of one step's batch, and what an operation costs. Knows no hardware and no time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What one request brings to a step."""

    num_new: int  # tokens to compute
    num_past: int  # tokens before them, with KV in the cache
    num_logit_rows: int = 1  # of the new tokens, those whose logits are wanted

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


@dataclass(frozen=True, slots=True)
class BatchShape:
    requests: tuple[RequestShape, ...]

    @property
    def num_tokens(self) -> int:
        return sum(r.num_new for r in self.requests)

    @property
    def num_logit_rows(self) -> int:
        return sum(r.num_logit_rows for r in self.requests)


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per number, as stored. Quantized formats are fractional (scales included)."""

    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    kv_bytes: float = 2.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation must do at least: arithmetic, and bytes to and from memory."""

    flops: int
    bytes_read: int
    bytes_written: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


ZERO_COST = Cost(0, 0, 0)
