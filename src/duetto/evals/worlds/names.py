"""Names of two syllables, in two pools that share none.

A name is a beginning, which any kind of thing may have, and an ending of its kind. Which of the two
pools a pair belongs to follows from the places of its syllables, so that no list has to be kept.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

ThingKind = Literal["person", "company", "town", "product", "event"]
Split = Literal["train", "eval"]

HELD_OUT_EVERY = 8  # of the endings of each beginning, one in so many is for evaluation


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BEGINNINGS = _words(
    """
    Bal Ban Bas Bel Ben Bil Bor Bos Bur Dal Dan Dar Del Fin Dor Dun
    Fal Fan Fen Fil Fos Ful Fur Gal Gan Gas Gel Gil Gor Gos Gul Gur
    Hal Han Hel Hil Hor Hul Kal Kan Kas Kel Kil Kor Kos Kun Kur Lan
    Lar Las Lin Lor Lun Mal Man Mas Mel Mil Mon Mor Mul Mur Nal Nan
    Nel Nil Nor Nul Pal Pan Pas Pel Pil Pol Pon Pul Ral Ran Rel Ril
    Ros Rul Sal San Sil Sol Sor Sul Tal Tan Tel Tol Tor Tul Val Vos
    """
)

ENDINGS: dict[ThingKind, tuple[str, ...]] = {
    "person": _words(
        """
        zia bert fred gard gene hild wyn ina jean kim mund mira
        quin rick jon gunde vard veig win zora zek vin hette frid
        """
    ),
    "company": _words(
        """
        bank chem co corp fab foods gear hold boats brew mart metal
        motors craft zone pharm steel works ware wheels mills group fibre kraft
        """
    ),
    "town": _words(
        """
        bridge brook burgh cliff combe cross field ford gate ham haven holm
        mere minster moor port stead stow ville wick wold worth vale grove
        """
    ),
    "product": _words(
        """
        blade brush clock filter gauge glass graph heater kettle mirror kite meter
        phone radio stove vane whistle box fan wheel jar hammer mixer chair
        """
    ),
    "event": _words(
        """
        ball carnival cup fair feast fest fete gala games jubilee marathon market
        mass race rally regatta revel week match concert circus jam vigil meet
        """
    ),
}

KINDS: tuple[ThingKind, ...] = ("person", "company", "town", "product", "event")


@dataclass(frozen=True, slots=True)
class Name:
    """What one thing is called. `str()` is the name as it is written."""

    beginning: str
    ending: str

    def __str__(self) -> str:
        return self.beginning + self.ending


def all_names(kind: ThingKind, split: Split) -> list[Name]:
    """Every name that a thing of this kind can have in this split."""
    return [
        Name(beginning, ending)
        for i, beginning in enumerate(BEGINNINGS)
        for j, ending in enumerate(ENDINGS[kind])
        if _is_held_out(i, j) == (split == "eval")
    ]


class NameSource:
    """Draws names for one world; no two that it draws begin alike."""

    def __init__(self, rng: Random, split: Split) -> None:
        self._rng = rng
        self._split = split
        self._left = rng.sample(range(len(BEGINNINGS)), len(BEGINNINGS))

    def draw(self, kind: ThingKind) -> Name:
        """Raises IndexError after as many names as there are beginnings."""
        i = self._left.pop()
        wanted = self._split == "eval"
        fitting = [j for j in range(len(ENDINGS[kind])) if _is_held_out(i, j) == wanted]
        return Name(BEGINNINGS[i], ENDINGS[kind][self._rng.choice(fitting)])


def _is_held_out(i: int, j: int) -> bool:
    return (i + j) % HELD_OUT_EVERY == 0
