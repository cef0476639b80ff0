"""Names: two pools that share none, drawn so that no two of a world begin alike."""

from random import Random

import pytest

from duetto.evals.worlds.names import BEGINNINGS, ENDINGS, KINDS, NameSource, all_names


def test_the_pools_share_no_name_and_leave_none_out() -> None:
    for kind in KINDS:
        train, held_out = (set(map(str, all_names(kind, split))) for split in ("train", "eval"))
        assert not train & held_out
        assert len(train) + len(held_out) == len(BEGINNINGS) * len(ENDINGS[kind])
        assert len(held_out) * 8 == len(train) + len(held_out)


def test_a_name_says_how_it_is_made() -> None:
    """No two pairs of syllables make the same name, over all kinds and both pools."""
    both = [all_names(kind, split) for kind in KINDS for split in ("train", "eval")]
    written = [str(name) for names in both for name in names]
    assert len(set(written)) == len(written)


def test_every_syllable_is_trained_on() -> None:
    for kind in KINDS:
        train = all_names(kind, "train")
        assert {name.beginning for name in train} == set(BEGINNINGS)
        assert {name.ending for name in train} == set(ENDINGS[kind])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_drawn_names_are_of_the_pool_and_begin_differently(split) -> None:
    source = NameSource(Random(3), split)
    drawn = [source.draw("town") for _ in BEGINNINGS]
    assert len({name.beginning for name in drawn}) == len(BEGINNINGS)
    assert set(drawn) <= set(all_names("town", split))
    with pytest.raises(IndexError):
        source.draw("town")
