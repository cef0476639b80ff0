"""Which operations that follow each other one kernel computes. No number changes.

A backend hands in the patterns that it has kernels for. Operations of a run stay in their order, so
a run may always be computed whole; what only the run itself reads need not be written at all, and
that nothing else reads it, this module finds. Knows no kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from duetto.program.op import Kind, KVAccess, Op, Ref
from duetto.program.ops import Add, GatedAct, Linear, RmsNorm, Rope, WriteKV
from duetto.program.program import Program
from duetto.program.shape import ZERO_COST, BatchShape, Cost, Precision, Rows


@dataclass(frozen=True, slots=True)
class FusedRun(Op):
    """Operations that follow each other. `dropped`: results of theirs that nobody else reads."""

    parts: tuple[Op, ...]
    dropped: tuple[Ref, ...]

    @property
    def reads(self) -> tuple[Ref, ...]:
        found: list[Ref] = []
        made: list[Ref] = []
        for part in self.parts:
            found += [ref for ref in part.reads if not any(m.covers(ref) for m in made)]
            made += part.writes
        return tuple(dict.fromkeys(found))

    @property
    def writes(self) -> tuple[Ref, ...]:
        every = dict.fromkeys(ref for part in self.parts for ref in part.writes)
        return tuple([ref for ref in every if ref not in self.dropped])

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.weights))

    @property
    def kv(self) -> KVAccess | None:
        return next((part.kv for part in self.parts if part.kv is not None), None)

    @property
    def rows(self) -> Rows:
        return self.parts[0].rows

    @property
    def main(self) -> Op:
        """The first of its parts of its own kind."""
        return next(part for part in self.parts if part.kind == self.kind)

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        return sum((part.cost(shape, precision) for part in self.parts), ZERO_COST)

    def label(self, program: "Program") -> str:
        return self.main.label(program)


class AddNorm(FusedRun):
    """Of RmsNorm (in place), Add and RmsNorm at least two, one after the other."""

    __slots__ = ()
    kind: ClassVar[Kind] = "norm"


class RopeWrite(FusedRun):
    """Queries and keys normed by head (or not), rotated (or not), and KV written."""

    __slots__ = ()
    kind: ClassVar[Kind] = "rope"


class GatedLinear(FusedRun):
    """A projection to gate and up, and their activation."""

    __slots__ = ()
    kind: ClassVar[Kind] = "linear"


# How many operations from a place on are one run of its class; 0: none.
Matches = Callable[[Sequence[Op]], int]


@dataclass(frozen=True, slots=True)
class RunPattern:
    made: type[FusedRun]
    matches: Matches
    needs_drop: bool = False  # only if what all parts but the last write is read by nobody else


def fuse_runs(program: Program, patterns: Sequence[RunPattern]) -> Program:
    """Fewer operations that compute the same result. The first pattern that matches is taken."""
    ops, results = program.ops, (program.logits, *program.outputs)
    found: list[Op] = []
    place = 0
    while place < len(ops):
        run = _run_at(ops, place, patterns, results)
        found.append(run or ops[place])
        place += len(run.parts) if run else 1
    return replace(program, ops=tuple(found))


def _run_at(
    ops: Sequence[Op], place: int, patterns: Sequence[RunPattern], results: Sequence[Ref]
) -> FusedRun | None:
    for pattern in patterns:
        count = pattern.matches(ops[place : place + _LONGEST])
        if not count:
            continue
        parts = tuple(ops[place : place + count])
        inner = dict.fromkeys(ref for part in parts[:-1] for ref in part.writes)
        after = ops[place + count :]
        dropped = tuple([ref for ref in inner if not _is_read(ref, after, results)])
        # What the last part writes over its own input is its result.
        dropped = tuple([ref for ref in dropped if ref not in parts[-1].writes])
        if pattern.needs_drop and len(dropped) < len(inner):
            continue
        return pattern.made(parts, dropped)
    return None


_LONGEST = 5


def _is_read(ref: Ref, ops: Sequence[Op], results: Sequence[Ref]) -> bool:
    """Whether any of `ops`, or the result, needs what `ref` holds before them."""
    for op in ops:
        if any(ref.overlaps(read) for read in op.reads):
            return True
        if any(written.covers(ref) for written in op.writes):
            return False
    return any(ref.overlaps(result) for result in results)


def add_norm(ops: Sequence[Op]) -> int:
    """[RmsNorm of y in place,] x = x + y [, RmsNorm of x]."""
    start = 0
    first = ops[0]
    if isinstance(first, RmsNorm) and first.x == first.out and first.group == first.x.width:
        start = 1
    if len(ops) <= start or not isinstance(add := ops[start], Add) or add.x != add.out:
        return 0
    if start and (not isinstance(first, RmsNorm) or add.y != first.out):
        return 0
    last = ops[start + 1] if len(ops) > start + 1 else None
    if isinstance(last, RmsNorm) and last.x == add.out and last.group == last.x.width:
        return start + 2
    return start + 1 if start else 0


def rope_write(ops: Sequence[Op]) -> int:
    """[RmsNorm of q by head, RmsNorm of k by head,] [Rope of q, Rope of k,] WriteKV."""
    place = 0
    norms = ops[:2]
    if len(norms) == 2 and all(isinstance(op, RmsNorm) and op.x == op.out for op in norms):
        place = 2
    ropes = ops[place : place + 2]
    are_ropes = len(ropes) == 2 and all(isinstance(op, Rope) for op in ropes)
    if not are_ropes:
        return 0
    q, k = ropes
    assert isinstance(q, Rope) and isinstance(k, Rope)
    write = ops[place + 2] if len(ops) > place + 2 else None
    if not isinstance(write, WriteKV) or write.k != k.x or q.spec != k.spec:
        return 0
    if place and not all(
        isinstance(norm, RmsNorm) and norm.group == rope.head_dim and norm.x == rope.x
        for norm, rope in zip(norms, (q, k), strict=True)
    ):
        return 0
    return place + 3


def gated_linear(ops: Sequence[Op]) -> int:
    """A projection without bias, that adds to nothing, and the activation of all it wrote."""
    if len(ops) < 2:
        return 0
    linear, act = ops[:2]
    if not isinstance(linear, Linear) or not isinstance(act, GatedAct):
        return 0
    plain = linear.bias is None and not linear.accumulate
    return 2 if plain and linear.out == act.x else 0


# What fused kernels of GPUs compute (backends/cuda).
GPU_RUNS = (
    RunPattern(AddNorm, add_norm),
    RunPattern(RopeWrite, rope_write),
    RunPattern(GatedLinear, gated_linear, needs_drop=True),
)
