"""What every operation says of itself, so that nobody has to ask which operation it is.

Running, pricing, fusing, cutting and explaining a program go by these properties. A backend has one
table from classes to kernels; everything else works for an operation that was not known when it was
written. Knows no operation and no hardware.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from duetto.core.errors import ConfigError
from duetto.program.shape import ALL, BatchShape, Cost, Precision, Rows

if TYPE_CHECKING:
    from duetto.program.cut import Cut, Piece
    from duetto.program.program import Program

# Which kernels an operation is like: those of one kind reach the same part of a device's peaks.
Kind = Literal[
    "linear", "attention", "norm", "rope", "activation", "add", "embed", "copy", "collective"
]


@dataclass(frozen=True, slots=True)
class Ref:
    """Columns [start, start + width) of a buffer."""

    buffer: str
    start: int
    width: int

    def columns(self, start: int, width: int) -> "Ref":
        """Some of these columns."""
        return Ref(self.buffer, self.start + start, width)

    def overlaps(self, other: "Ref") -> bool:
        """Whether the two have a column in common."""
        return (
            self.buffer == other.buffer
            and self.start < other.start + other.width
            and other.start < self.start + self.width
        )

    def covers(self, other: "Ref") -> bool:
        """Whether these columns include all of the other's."""
        return (
            self.buffer == other.buffer
            and self.start <= other.start
            and other.start + other.width <= self.start + self.width
        )


class KVAccess(NamedTuple):
    """How an operation uses a layer's KV: each row writes its own token's, or reads those of its
    request up to itself, the last `window` of them where that is given."""

    layer: int
    writes: bool
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """One step of a program. A new operation defines `kind`, `reads`, `writes` and `cost`, and
    whatever else differs from what is said here."""

    kind: ClassVar[Kind]
    # Each column of the result depends on the same columns of the operands only, so a rank can
    # compute the columns that it has.
    by_columns: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[Ref, ...]:
        """The columns that it reads; what it adds to is read too."""
        raise NotImplementedError

    @property
    def writes(self) -> tuple[Ref, ...]:
        """The columns that it writes."""
        raise NotImplementedError

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights that it reads, the matrix first."""
        return ()

    @property
    def initial(self) -> Mapping[str, float]:
        """Of weights that a random model fills with one number, that number."""
        return {}

    @property
    def kv(self) -> KVAccess | None:
        """What it does with KV."""
        return None

    @property
    def rows(self) -> Rows:
        """The rows that it writes."""
        return ALL

    @property
    def hops(self) -> int:
        """How many messages between devices follow each other; 0 for all but collectives."""
        return 0

    @property
    def main(self) -> "Op":
        """The operation that its time is reported as: itself, if it is not fused of several."""
        return self

    def cost(self, shape: BatchShape, precision: Precision) -> Cost:
        """FLOPs and bytes for a batch, affine in its rows, its attended pairs and its KV tokens.

        The bytes of a collective are those that each rank sends over the link.
        """
        raise NotImplementedError

    def label(self, program: "Program") -> str:
        """What a reader calls it, the same in each layer of `program`."""
        del program
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    def pieces(self, program: "Program") -> tuple["Piece", ...]:
        """The columns that tensor parallelism shares out because of this operation."""
        del program
        return ()

    def share(self, cut: "Cut") -> tuple["Op", ...]:
        """What one rank computes of it, and the collective that follows, if one does.

        Raises ConfigError if it cannot be cut as its operands are.
        """
        for weight in self.weights:
            cut.keep(weight)
        refs = {*self.reads, *self.writes}
        num_cut = sum(map(cut.has, refs))
        if not num_cut:
            return (self,)
        if num_cut < len(refs) or not self.by_columns:
            raise ConfigError(
                f"--tp: {type(self).__name__} cannot be computed from a part of its columns; "
                "accepted: --tp 1"
            )
        operands = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {name: cut.own(ref) for name, ref in operands.items() if isinstance(ref, Ref)}
        return (replace(self, **own),)
