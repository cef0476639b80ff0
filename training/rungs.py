"""The ladder: what each rung teaches, and the mark on held-out data that ends it.

From recall of single tokens to questions over several documents. Trained directly on the last, a
small model stays at chance for millions of tokens; each rung here is learned from the one before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from duetto.bench.worlds.story import VARIED, Style
from duetto.bench.worlds.world import QUESTION_KINDS, QuestionKind
from training.draws import PLAIN, Draw, alike, bridged, mix, pairs, retold, scattered, worlds

STATED: tuple[QuestionKind, ...] = ("one_hop", "two_hop")
LAST_STEPS = 3000
RECALL_RATE = 2e-3
WORDED = Style(second_sentence=0.0)
SECOND = Style(wordings=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A mark is exact match on held-out data of `tested` (else of `draw`), by kind of question."""

    name: str
    draw: Draw  # the sequence of a seed, in a split
    marks: Mapping[str, float]
    tested: Draw | None = None
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    max_steps: int = 20_000  # without the mark by then, the climb stops
    decays: bool = False  # the last rung: all steps are taken, and the rate falls to zero


def ladder() -> tuple[Rung, ...]:
    recall, one_hop = {"recall": 0.95}, {"one_hop": 0.90}
    whole = {"one_hop": 0.95, "two_hop": 0.85, "not_stated": 0.80}
    every = worlds((6,), QUESTION_KINDS, VARIED)
    return (
        Rung(name="pairs-4", draw=pairs(4), marks=recall, learning_rate=RECALL_RATE),
        Rung(name="pairs-16", draw=pairs(16), marks=recall, learning_rate=RECALL_RATE),
        Rung(
            name="scattered",
            draw=_scattered_mix(),
            marks={"recall": 0.85},
            learning_rate=RECALL_RATE,
        ),
        Rung(name="alike", draw=_alike_mix(), marks=one_hop, learning_rate=RECALL_RATE),
        Rung(
            name="bridges",
            draw=_bridge_mix(),
            tested=worlds((6,), STATED, PLAIN),
            marks={"one_hop": 0.90, "two_hop": 0.80},
        ),
        Rung(
            name="wordings",
            draw=_wording_mix(),
            tested=worlds((6,), STATED, VARIED),
            marks={"one_hop": 0.93, "two_hop": 0.80},
        ),
        Rung(name="not-stated", draw=_doubt_mix(), tested=every, marks=whole),
        Rung(
            name="all",
            draw=worlds(tuple(range(1, 9)), QUESTION_KINDS, VARIED),
            tested=every,
            marks=whole,
            max_steps=LAST_STEPS,
            decays=True,
        ),
    )


def _scattered_mix() -> Draw:
    """Recall at growing distances: the easy ones teach what the hard ones take."""
    return mix(
        *(
            scattered(count, most, whole=whole)
            for count in (4, 6, 8)
            for most in (0, 1, 2, 3, 5)
            for whole in (False, True)
        )
    )


def _alike_mix() -> Draw:
    return mix(
        scattered(8, 4, whole=True),
        scattered(6, 2, whole=False),
        retold(8, 1),
        alike(4, 1, whole=False),
        alike(8, 1, whole=False),
        alike(4, 1),
        alike(8, 1),
        alike(8, 1),
        alike(8, 2),
    )


def _bridge_mix() -> Draw:
    return mix(
        alike(8, 3),
        bridged(2),
        bridged(3),
        bridged(3),
        bridged(4),
        bridged(4),
        bridged(3, 2, "shuffled"),
        worlds((4, 6), STATED, PLAIN),
    )


def _wording_mix() -> Draw:
    return mix(
        bridged(2),
        bridged(3),
        bridged(3),
        bridged(3, style=WORDED),
        bridged(3, style=WORDED),
        alike(8, 1, WORDED),
        alike(8, 2, WORDED),
        alike(8, 3, WORDED),
        alike(6, 1, SECOND),
        alike(6, 2, SECOND),
        alike(6, 2, VARIED),
    )


def _doubt_mix() -> Draw:
    """Not stated comes last, and seldom: met earlier or often, it was the answer to everything."""
    return mix(
        alike(8, 2, WORDED),
        alike(8, 3, WORDED),
        alike(6, 1, VARIED),
        alike(6, 2, VARIED),
        bridged(2),
        bridged(3),
        bridged(3, style=WORDED),
        bridged(2, style=VARIED),
        worlds((6,), ("one_hop", "not_stated"), VARIED, 0, most_not_stated=3),
        worlds((3, 4), QUESTION_KINDS, VARIED, most_not_stated=3),
        worlds((6,), QUESTION_KINDS, VARIED, most_not_stated=3),
        worlds((6,), QUESTION_KINDS, VARIED, most_not_stated=3),
    )
