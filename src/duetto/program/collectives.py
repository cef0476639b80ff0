"""The operations in which devices exchange numbers. Rewrites insert them; models have none.

The bytes of their prices go over a link, not to and from memory.
"""

from dataclasses import dataclass
from typing import ClassVar

from duetto.program.op import Kind, Op, Ref
from duetto.program.shape import ALL, BatchShape, Cost, Precision, Rows, num_rows


@dataclass(frozen=True, slots=True)
class AllReduce(Op):
    """x = the sum of all ranks' x, in the order of ranks. A ring: each rank sends 2 (n-1)/n of the
    numbers in 2 (n-1) hops."""

    x: Ref
    ranks: int
    rows: Rows = ALL

    kind: ClassVar[Kind] = "collective"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def hops(self) -> int:
        return 2 * (self.ranks - 1)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return _sent(self, self.x.width * self.hops / self.ranks, shape, precision)


@dataclass(frozen=True, slots=True)
class AllGather(Op):
    """out = all ranks' x, side by side; x is where a rank's own columns stand in `out`. Each rank
    sends (n-1)/n of the numbers in n-1 hops."""

    x: Ref
    out: Ref
    ranks: int
    rows: Rows = ALL

    kind: ClassVar[Kind] = "collective"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return (self.out,)

    @property
    def hops(self) -> int:
        return self.ranks - 1

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return _sent(self, self.out.width * self.hops / self.ranks, shape, precision)


@dataclass(frozen=True, slots=True)
class Send(Op):
    """The columns go to the next stage of a pipeline."""

    x: Ref

    kind: ClassVar[Kind] = "collective"

    @property
    def reads(self) -> tuple[Ref, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[Ref, ...]:
        return ()

    @property
    def hops(self) -> int:
        return 1

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return _sent(self, self.x.width, shape, precision)


def _sent(op: Op, numbers: float, shape: BatchShape, precision: Precision) -> Cost:
    """Of a collective that sends so many numbers of each row."""
    return Cost(0, int(num_rows(shape, op.rows) * numbers * precision.activation_bytes), 0)
