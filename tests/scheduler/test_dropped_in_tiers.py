"""What a user drops is not found in any tier, nor when a move brings it later."""

from duetto.core.batch import MoveResult
from duetto.scheduler.tiers import Tiers, TierSizes

KEY, OTHER = b"k" * 32, b"o" * 32


def tiers_with_a_disk() -> Tiers:
    tiers = Tiers(TierSizes(num_ram_blocks=4, has_disk=True), 1)
    tiers.note_published([KEY, OTHER], [0, 1], b"")
    return tiers


def done(tiers: Tiers) -> None:
    """All moves that were planned have been done."""
    tiers.take([MoveResult(move.move_id, len(move.keys)) for move in tiers.departing()])
    tiers.check()


def test_what_was_not_written_yet_is_not_written() -> None:
    tiers = tiers_with_a_disk()
    tiers.forget([KEY])
    tiers.begin(0.0)
    drop, move = tiers.departing()
    assert (drop.source, drop.target, drop.keys) == ("disk", "nowhere", (KEY,))
    assert (move.keys, move.source_blocks) == ((OTHER,), (1,))


def test_what_is_being_written_is_not_on_the_disk() -> None:
    tiers = tiers_with_a_disk()
    tiers.begin(0.0)
    tiers.forget([KEY])
    done(tiers)
    assert tiers._on_disk == {OTHER}


def test_what_is_on_its_way_to_ram_does_not_arrive() -> None:
    tiers = tiers_with_a_disk()
    tiers.keep(KEY, 0)
    tiers.keep(OTHER, 1)
    tiers.forget([KEY])
    done(tiers)
    assert KEY not in tiers._ram and OTHER in tiers._ram


def test_what_is_there_is_gone_and_may_come_again() -> None:
    tiers = tiers_with_a_disk()
    tiers.begin(0.0)
    tiers.keep(KEY, 0)
    done(tiers)
    assert KEY in tiers._ram and KEY in tiers._on_disk
    tiers.forget([KEY])
    assert KEY not in tiers._ram and KEY not in tiers._on_disk
    tiers.note_published([KEY], [2], b"")
    tiers.begin(1.0)
    tiers.keep(KEY, 2)
    done(tiers)
    assert KEY in tiers._ram and KEY in tiers._on_disk


def test_a_drop_is_remembered_no_longer_than_moves_that_were_planned_before_it() -> None:
    """Though there are always others without a result."""
    tiers, late = tiers_with_a_disk(), list[MoveResult]()
    for number in range(100):
        key = bytes([number]) * 32
        tiers.note_published([key], [2], b"")
        tiers.begin(float(number))
        tiers.forget([key])
        results = [MoveResult(move.move_id, len(move.keys)) for move in tiers.departing()]
        tiers.take(late)
        late = results
        assert len(tiers._forgotten) <= 2
        tiers.check()


def test_without_tiers_there_is_nothing_to_forget() -> None:
    tiers = Tiers(TierSizes(), 1)
    assert tiers.forget([KEY]) == []
    assert not tiers.departing() and not tiers.has_pending
