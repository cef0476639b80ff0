"""What an operation costs for a batch of some shape. Knows no hardware and no time."""

from dataclasses import dataclass
from typing import TypeVar

from duetto.core.shape import BatchShape, RequestShape

__all__ = [
    "ALL",
    "SELECTED",
    "ZERO_COST",
    "BatchShape",
    "Cost",
    "Precision",
    "RequestShape",
    "Rows",
    "num_rows",
    "of_rows",
]

T = TypeVar("T")
Rows = str  # the name of a set of a step's rows
ALL: Rows = "all"  # the step's tokens
SELECTED: Rows = "selected"  # those whose logits are wanted


def num_rows(shape: BatchShape, rows: Rows) -> int:
    """How many rows of a set a step has. Raises ValueError for a set that no step has."""
    return of_rows(rows, shape.num_tokens, shape.num_logit_rows)


def of_rows(rows: Rows, every: T, selected: T) -> T:
    """What belongs to a set of rows. Raises ValueError for a set that no step has."""
    if rows == ALL:
        return every
    if rows == SELECTED:
        return selected
    raise ValueError(f"a step has no rows named {rows!r}; it has {ALL!r} and {SELECTED!r}")


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
