"""How columns are shared out: every unit has a rank, the first rank has the most."""

import pytest

from duetto.program.cut import Piece
from duetto.program.op import Ref

UNIT = 3  # columns


def piece(count: int, uneven: str) -> Piece:
    return Piece(Ref("x", 7, count * UNIT), count, uneven)  # type: ignore[arg-type]


def units_of_ranks(one: Piece, ranks: int) -> list[list[int]]:
    found = []
    for rank in range(ranks):
        start, width = one.of_rank(rank, ranks)
        assert start % UNIT == width % UNIT == 0
        found.append(list(range(start // UNIT, (start + width) // UNIT)))
    return found


@pytest.mark.parametrize("ranks", range(1, 14))
@pytest.mark.parametrize("count", range(1, 14))
def test_every_unit_has_a_rank(count: int, ranks: int) -> None:
    for uneven in ("refuse", "copy", "ragged"):
        one = piece(count, uneven)
        fits = count % ranks == 0 or uneven == "ragged"
        assert one.fits(ranks) == (fits or (uneven == "copy" and ranks % count == 0))
        if not one.fits(ranks):
            continue
        units = units_of_ranks(one, ranks)
        flat = [unit for own in units for unit in own]
        assert len(units[0]) == max(map(len, units))
        if fits:
            assert flat == list(range(count))
        else:  # each unit is kept by as many ranks, side by side
            assert flat == [unit for unit in range(count) for _ in range(ranks // count)]


@pytest.mark.parametrize(
    ("a", "b", "overlap", "covers"),
    [
        (Ref("x", 0, 4), Ref("x", 0, 4), True, True),
        (Ref("x", 0, 4), Ref("x", 1, 2), True, True),
        (Ref("x", 1, 2), Ref("x", 0, 4), True, False),
        (Ref("x", 0, 4), Ref("x", 3, 4), True, False),
        (Ref("x", 0, 4), Ref("x", 4, 4), False, False),
        (Ref("x", 0, 4), Ref("y", 0, 4), False, False),
    ],
)
def test_columns_that_meet(a: Ref, b: Ref, overlap: bool, covers: bool) -> None:
    assert a.overlaps(b) == b.overlaps(a) == overlap
    assert a.covers(b) == covers
