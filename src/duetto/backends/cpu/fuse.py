"""Which neighbours of a Program are computed as one. Knows what operations read and write, and
nothing of kernels.

Two patterns: a norm of whole rows whose result only projections read, and a gated activation whose
result only one projection reads. Neither changes a number: the projection makes the same rows for
itself, where they are still in the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from duetto.core.errors import ConfigError
from duetto.program.ops import (
    Add,
    Attention,
    Embed,
    GatedAct,
    Linear,
    Op,
    Ref,
    RmsNorm,
    Rope,
    SelectRows,
    SoftCap,
    WriteKV,
)


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """A projection of what `before` makes of its own input, if there is a `before`."""

    linear: Linear
    before: RmsNorm | GatedAct | None = None


Step = Op | FusedLinear  # no plain Linear is left

# The fields that say what each operation reads, and writes.
_READS: dict[type, tuple[str, ...]] = {
    Embed: (),
    RmsNorm: ("x",),
    Linear: ("x",),  # and `out`, if it accumulates
    Rope: ("x",),
    WriteKV: ("k", "v"),
    Attention: ("q",),
    GatedAct: ("x",),
    Add: ("x", "y"),
    SelectRows: ("x",),
    SoftCap: ("x",),
}
_WRITES: dict[type, tuple[str, ...]] = dict.fromkeys(_READS, ("out",)) | {
    Rope: ("x",),
    WriteKV: (),
    SoftCap: ("x",),
}


def fuse(ops: Sequence[Op], result: Ref) -> Iterator[Step]:
    """Fewer steps that compute the same `result`, in the same order.

    Raises ConfigError for an operation that this backend does not know.
    """
    for op in ops:
        if type(op) not in _READS:
            raise ConfigError(
                f"--backend cpu: knows no operation {type(op).__name__}, which this model has; "
                f"--backend reference may"
            )
    before: dict[int, int] = {}  # place of a projection -> place of what it makes for itself
    for place, op in enumerate(ops):
        if isinstance(op, RmsNorm | GatedAct):
            before |= dict.fromkeys(_absorbers(ops, place, op, result), place)
    gone = set(before.values())
    for place, op in enumerate(ops):
        if isinstance(op, Linear):
            source = ops[before[place]] if place in before else None
            assert source is None or isinstance(source, RmsNorm | GatedAct)
            yield FusedLinear(op, source)
        elif place not in gone:
            yield op


def _absorbers(
    ops: Sequence[Op], place: int, op: RmsNorm | GatedAct, result: Ref
) -> tuple[int, ...]:
    """The places of the projections that can make `op`'s rows for themselves; () if any reader
    cannot, as then the rows are needed anyway.
    """
    if isinstance(op, RmsNorm) and op.group != op.x.width:
        return ()
    readers = []
    for later in range(place + 1, len(ops)):
        candidate = ops[later]
        if any(_overlap(op.out, ref) for ref in _reads(candidate)):
            if not _can_absorb(candidate, op):
                return ()
            readers.append(later)
        written = _writes(candidate)
        if any(_covers(ref, op.out) for ref in written):
            break  # from here on the columns hold something else
        if any(_overlap(ref, op.out) for ref in written):
            return ()
    else:
        if _overlap(op.out, result):
            return ()
    if isinstance(op, GatedAct) and len(readers) > 1:
        return ()  # dear to make twice
    between = ops[place + 1 : readers[-1]] if readers else ()
    if any(_overlap(ref, op.x) for other in between for ref in _writes(other)):
        return ()  # the input will be gone
    return tuple(readers)


def _can_absorb(candidate: Op, op: RmsNorm | GatedAct) -> bool:
    """A projection of exactly these columns, that does not write where it would read."""
    return (
        isinstance(candidate, Linear)
        and candidate.x == op.out
        and not _overlap(candidate.out, op.out)
        and not _overlap(candidate.out, op.x)
    )


def _reads(op: Op) -> tuple[Ref, ...]:
    accumulated = (op.out,) if isinstance(op, Linear) and op.accumulate else ()
    return (*(getattr(op, name) for name in _READS[type(op)]), *accumulated)


def _writes(op: Op) -> tuple[Ref, ...]:
    return tuple(getattr(op, name) for name in _WRITES[type(op)])


def _overlap(a: Ref, b: Ref) -> bool:
    return a.buffer == b.buffer and a.start < b.start + b.width and b.start < a.start + a.width


def _covers(a: Ref, b: Ref) -> bool:
    return a.buffer == b.buffer and a.start <= b.start and b.start + b.width <= a.start + a.width
