"""Which neighbours of a program are computed as one.

A projection may make its input for itself, row by row, where the rows are still in the cache. What
a backend can make so, it says in a table; that nothing else needs the rows, this module finds from
what operations read and write. No number changes. Knows no kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from duetto.program.op import Kind, Op, Ref
from duetto.program.ops import Linear
from duetto.program.program import Program
from duetto.program.shape import BatchShape, Cost, Precision, Rows

# By how many projections an operation may be made again, each for itself; 0: by none.
Absorbed = Mapping[type[Op], Callable[[Any], int]]


@dataclass(frozen=True, slots=True)
class FusedLinear(Op):
    """`before`, and a projection of what it made. What `before` writes is lost behind it."""

    before: Op
    linear: Linear

    kind: ClassVar[Kind] = "linear"

    @property
    def reads(self) -> tuple[Ref, ...]:
        made = self.before.writes
        return (*self.before.reads, *(ref for ref in self.linear.reads if ref not in made))

    @property
    def writes(self) -> tuple[Ref, ...]:
        return self.linear.writes

    @property
    def weights(self) -> tuple[str, ...]:
        return (*self.linear.weights, *self.before.weights)

    @property
    def rows(self) -> Rows:
        return self.linear.rows

    @property
    def main(self) -> Op:
        return self.linear

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return self.before.cost(shape, precision) + self.linear.cost(shape, precision)

    def label(self, program: "Program") -> str:
        return self.linear.label(program)


def fuse(program: Program, absorbed: Absorbed) -> Program:
    """Fewer operations that compute the same result, in the same order."""
    ops, results = program.ops, (program.logits, *program.outputs)
    before: dict[int, int] = {}  # place of a projection -> place of what it makes for itself
    for place, op in enumerate(ops):
        limit = absorbed[type(op)](op) if type(op) in absorbed else 0
        readers = _absorbers(ops, place, results) if limit else ()
        if 0 < len(readers) <= limit:
            before |= dict.fromkeys(readers, place)
    gone = set(before.values())
    found: list[Op] = []
    for place, op in enumerate(ops):
        if isinstance(op, Linear) and place in before:
            found.append(FusedLinear(ops[before[place]], op))
        elif place not in gone:
            found.append(op)
    return replace(program, ops=tuple(found))


def _absorbers(ops: Sequence[Op], place: int, results: Sequence[Ref]) -> tuple[int, ...]:
    """The places of the projections that can make the rows of the operation at `place` for
    themselves; () if any reader cannot, as then the rows are needed anyway.
    """
    op = ops[place]
    (out,) = op.writes
    readers = []
    for later in range(place + 1, len(ops)):
        candidate = ops[later]
        if any(out.overlaps(ref) for ref in candidate.reads):
            if not _can_absorb(candidate, op, out):
                return ()
            readers.append(later)
        if any(ref.covers(out) for ref in candidate.writes):
            break  # from here on the columns hold something else
        if any(ref.overlaps(out) for ref in candidate.writes):
            return ()
    else:
        if any(out.overlaps(result) for result in results):
            return ()
    between = ops[place + 1 : readers[-1]] if readers else ()
    if any(ref.overlaps(x) for other in between for ref in other.writes for x in op.reads):
        return ()  # the input will be gone
    return tuple(readers)


def _can_absorb(candidate: Op, op: Op, out: Ref) -> bool:
    """A projection of exactly these columns, that does not write where it would read."""
    return (
        isinstance(candidate, Linear)
        and candidate.x == out
        and candidate.rows == op.rows
        and not any(candidate.out.overlaps(ref) for ref in (out, *op.reads))
    )
