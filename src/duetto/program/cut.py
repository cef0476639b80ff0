"""How the columns of buffers and the parts of weights are shared out between ranks.

Tensor parallelism is Megatron's (Shoeybi et al., 2019). Operations name the pieces that may be cut
(`Op.pieces`); a `Cut` answers, for one rank, which columns of a piece are its own, and remembers
which part of each weight its operations asked for. Knows no operation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from duetto.core.errors import ConfigError
from duetto.program.op import Ref


class Span(NamedTuple):
    """Rows, or columns, [start, start + width) of a weight or of a piece."""

    start: int
    width: int

    @property
    def end(self) -> int:
        return self.start + self.width


class WeightPart(NamedTuple):
    """What a rank has of a weight: these rows, and these columns, one after the other. None: all.

    The rows of a vector are its numbers.
    """

    rows: tuple[Span, ...] | None = None
    columns: tuple[Span, ...] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of that shape."""
        found = list(whole)
        for axis, spans in enumerate((self.rows, self.columns)):
            if spans is not None:
                found[axis] = sum(span.width for span in spans)
        return tuple(found)

    def rows_of(self, whole: int, first: int, count: int) -> tuple[Span, ...]:
        """Where some of its rows, counted from its first one, stand in a weight of `whole` rows."""
        found, begin = [], 0
        for span in self.rows or (Span(0, whole),):
            start = max(first, begin)
            end = min(first + count, begin + span.width)
            if start < end:
                found.append(Span(span.start + start - begin, end - start))
            begin += span.width
        return tuple(found)


WHOLE = WeightPart()


@dataclass(frozen=True, slots=True)
class Piece:
    """Columns that may be cut between any of `count` units of equal width.

    `uneven` says what happens if the ranks do not divide the units: it cannot be ("refuse"), a unit
    is kept by several ranks if the units divide the ranks ("copy"), or the last ranks have
    less than the first ("ragged").
    """

    columns: Ref
    count: int
    uneven: Literal["refuse", "copy", "ragged"] = "refuse"

    def fits(self, ranks: int) -> bool:
        """Whether so many ranks can share it."""
        if self.count % ranks == 0 or self.uneven == "ragged":
            return True
        return self.uneven == "copy" and ranks % self.count == 0

    def of_rank(self, rank: int, ranks: int) -> Span:
        """The columns of one rank, counted from the first of this piece."""
        unit = self.columns.width // self.count
        if self.uneven == "copy" and self.count < ranks:
            return Span(rank * self.count // ranks * unit, unit)
        share = -(-self.count // ranks)
        start = min(rank * share, self.count)
        return Span(start * unit, min(share, self.count - start) * unit)


@dataclass
class Cut:
    """One rank's share. Operations ask it for their own columns, and of weights."""

    rank: int
    ranks: int
    result: Ref  # the program's: computed in parts, and then gathered
    pieces: Mapping[str, tuple[Piece, ...]]  # of each buffer that is cut, in the order of columns
    parts: dict[str, WeightPart] = field(default_factory=dict)  # of each weight that is used
    _owned: dict[Ref, Ref] = field(default_factory=dict)

    def has(self, ref: Ref) -> bool:
        """Whether a rank has only some of these columns."""
        return ref.buffer in self.pieces

    def own(self, ref: Ref) -> Ref:
        """Where a rank has its own of these columns, in a buffer that has no others."""
        if ref not in self._owned:  # layers are alike: most have been asked for before
            pieces = self.pieces[ref.buffer]
            start = sum(self._span(p).width for p in pieces if p.columns.start < ref.start)
            width = sum(self._span(p).width for p in self._within(ref))
            self._owned[ref] = Ref(ref.buffer, start, width)
        return self._owned[ref]

    def width(self, buffer: str, whole: int) -> int:
        """Columns of a rank's buffer."""
        return self.own(Ref(buffer, 0, whole)).width if buffer in self.pieces else whole

    def own_result(self) -> Ref:
        """The part of the result that this rank computes, where it stands in the whole."""
        return self.result.columns(*result_parts(self.result, self.ranks)[self.rank])

    def keep(self, weight: str) -> None:
        """An operation needs all of a weight."""
        self._take(weight, WHOLE)

    def take_rows(self, weight: str, of: Ref) -> None:
        """An operation needs the rows of a weight that make its own columns of `of`."""
        self._take(weight, WeightPart(rows=self._spans(of)))

    def take_columns(self, weight: str, of: Ref) -> None:
        """An operation needs the columns of a weight that its own columns of `of` meet."""
        self._take(weight, WeightPart(columns=self._spans(of)))

    def take_result_rows(self, weight: str) -> Span:
        """An operation needs the rows of a weight that make its part of the result."""
        span = result_parts(self.result, self.ranks)[self.rank]
        self._take(weight, WeightPart(rows=(span,)))
        return span

    def _take(self, weight: str, part: WeightPart) -> None:
        if self.parts.setdefault(weight, part) != part:
            raise ConfigError(
                f"--tp: two operations need different parts of {weight}; accepted: --tp 1"
            )

    def _spans(self, ref: Ref) -> tuple[Span, ...]:
        found = []
        for piece in self._within(ref):
            start, width = self._span(piece)
            found.append(Span(piece.columns.start - ref.start + start, width))
        return tuple(found)

    def _within(self, ref: Ref) -> list[Piece]:
        found = [p for p in self.pieces[ref.buffer] if ref.covers(p.columns)]
        if sum(piece.columns.width for piece in found) != ref.width:
            raise ConfigError(
                f"--tp: columns {ref.start} to {ref.start + ref.width} of {ref.buffer} are not "
                "cut as the others are; accepted: --tp 1"
            )
        return found

    def _span(self, piece: Piece) -> Span:
        return piece.of_rank(self.rank, self.ranks)


def result_parts(result: Ref, ranks: int) -> tuple[Span, ...]:
    """The columns of the result that each rank computes: the last ranks may have fewer."""
    piece = Piece(result, result.width, "ragged")
    return tuple(piece.of_rank(rank, ranks) for rank in range(ranks))


def by_buffer(pieces: Iterable[Piece]) -> dict[str, tuple[Piece, ...]]:
    """Pieces of each buffer, in the order of columns; raises ConfigError where two disagree."""
    found: dict[str, dict[Ref, Piece]] = {}
    for piece in pieces:
        others = found.setdefault(piece.columns.buffer, {})
        for other in others.values():
            if other != piece and other.columns.overlaps(piece.columns):
                raise ConfigError(
                    f"--tp: two operations cut {piece.columns.buffer} differently; accepted: --tp 1"
                )
        others[piece.columns] = piece
    return {
        buffer: tuple(sorted(own.values(), key=lambda piece: piece.columns.start))
        for buffer, own in found.items()
    }
