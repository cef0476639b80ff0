"""How a part's process is joined to the others: what it inherits, by the numbers of descriptors.

Knows no processes and no programs.
"""

import socket
from struct import Struct
from typing import NamedTuple

import msgspec

from duetto.backends.backend import FloatArray
from duetto.backends.parts.messages import receive_exactly
from duetto.backends.parts.part import PartPlace
from duetto.backends.parts.rows import RowsMemory

_NOTE = Struct("<qq")  # an order's number, and how many rows there are of it
_NO_ROWS = -1  # a stage failed


class Wiring(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one part. None: it has no such neighbour."""

    index: int  # among all parts
    place: PartPlace
    board: int
    before: tuple[int, int] | None = None  # socket and rows of the same rank of the stage before
    behind: tuple[int, int] | None = None
    results: int | None = None  # rows of logits, of the part that gives them to the engine
    group: int | None = None  # the memory in which the ranks of its stage meet

    @property
    def descriptors(self) -> list[int]:
        pairs = [each for pair in (self.before, self.behind) if pair for each in pair]
        singles = [each for each in (self.results, self.group) if each is not None]
        return [self.board, *pairs, *singles]


class StageSkipped(Exception):
    """A stage before this one failed at this step."""


class NeighbourGone(Exception):
    """The process of another part has ended."""


class StageLink(NamedTuple):
    """From one stage to the next: rows in shared memory, and a note that they are there. Methods
    raise NeighbourGone."""

    socket: socket.socket
    rows: RowsMemory

    def send(self, order: int, place: int, arrays: list[FloatArray]) -> None:
        self._note(order, self.rows.write(place, arrays))

    def skip(self, order: int) -> None:
        """There will be no rows of this step."""
        self._note(order, _NO_ROWS)

    def receive(self, order: int, place: int, num_rows: int) -> list[FloatArray]:
        """Waits for the rows, which lie there until the arena's next step. Raises StageSkipped."""
        try:
            theirs, count = _NOTE.unpack(receive_exactly(self.socket, _NOTE.size))
        except (EOFError, OSError):
            raise NeighbourGone from None
        assert theirs == order, "stages take steps in one order"
        if count == _NO_ROWS:
            raise StageSkipped
        assert count == num_rows, "stages compute the same tokens"
        return self.rows.views(place, num_rows)

    def _note(self, order: int, num_rows: int) -> None:
        try:
            self.socket.sendall(_NOTE.pack(order, num_rows))
        except OSError:
            raise NeighbourGone from None
