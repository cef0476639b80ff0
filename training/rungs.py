"""The ladder: what each rung teaches, and the mark on held-out data that ends it.

From recall of single tokens to questions over several documents. Trained directly on the last, a
small model stays at chance for millions of tokens; each rung here is learned from the one before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from duetto.evals.worlds.story import VARIED, Style
from duetto.evals.worlds.world import QUESTION_KINDS, QuestionKind
from training.draws import (
    PLAIN,
    Draw,
    alike,
    bridged,
    compared,
    in_order,
    mix,
    pairs,
    retold,
    scattered,
    without_documents,
    worlds,
)

STATED: tuple[QuestionKind, ...] = ("one_hop", "two_hop")
ONE_HOP: tuple[QuestionKind, ...] = ("one_hop", "not_stated")
TOLD: tuple[QuestionKind, ...] = ("one_hop", "two_hop", "not_stated")
LAST_STEPS = 1600
LONGEST_STEPS = 100
LONGER_STEPS = 240
LONGER_BATCH = 8
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
    learning_rate: float = 1e-3
    max_steps: int = 3000  # without the mark by then, the climb goes on all the same
    decays: bool = False  # the last rung: all steps are taken, and the rate falls to zero


def ladder() -> tuple[Rung, ...]:
    recall, whole = {"recall": 0.95}, {"one_hop": 0.95, "two_hop": 0.85, "not_stated": 0.80}
    return (
        Rung(name="pairs-4", draw=pairs(4), marks=recall, learning_rate=RECALL_RATE),
        Rung(name="pairs-16", draw=pairs(16), marks=recall, learning_rate=RECALL_RATE),
        Rung(
            name="scattered",
            draw=_scattered_mix(),
            marks={"recall": 0.85},
            learning_rate=RECALL_RATE,
        ),
        Rung(name="alike", draw=_alike_mix(), marks={"one_hop": 0.90}),
        Rung(
            name="bridges",
            draw=_bridge_mix(),
            tested=worlds((6,), STATED, PLAIN),
            marks={"one_hop": 0.93, "two_hop": 0.80},
        ),
        Rung(
            name="doubt",
            draw=_doubt_mix(),
            tested=worlds((6,), TOLD, PLAIN),
            marks={"one_hop": 0.93, "two_hop": 0.80, "not_stated": 0.70},
        ),
        Rung(
            name="wordings",
            draw=_wording_mix(),
            tested=worlds((6,), QUESTION_KINDS, VARIED),
            marks={"one_hop": 0.93, "two_hop": 0.80, "comparison": 0.80},
            max_steps=800,
        ),
        Rung(
            name="all",
            draw=_whole_mix(),
            tested=worlds((6,), QUESTION_KINDS, VARIED),
            marks=whole,
            max_steps=LAST_STEPS,
            decays=True,
        ),
    )


def longer() -> tuple[Rung, ...]:
    """For a reader that has climbed the ladder: documents of more sentences, most of them beside
    the point, and those that it knows, or it would forget them.

    The second rung leaves out the longest: they cost most, and few steps did not teach them.
    """
    return (
        Rung(
            name="longest",
            draw=_longest_mix(),
            tested=worlds((6,), QUESTION_KINDS, VARIED, num_sentences=8),
            marks={"one_hop": 0.95, "two_hop": 0.90},
            batch_size=LONGER_BATCH,
            max_steps=LONGEST_STEPS,
        ),
        Rung(
            name="longer",
            draw=_longer_mix(),
            tested=worlds((6,), QUESTION_KINDS, VARIED, num_sentences=4),
            marks={"one_hop": 0.95, "two_hop": 0.90},
            batch_size=LONGER_BATCH,
            max_steps=LONGER_STEPS,
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
        alike(8, 1),
        alike(8, 3),
        bridged(2),
        bridged(3),
        bridged(3),
        bridged(4),
        bridged(3, 2, "shuffled"),
        worlds((4, 6), STATED, PLAIN),
    )


def _doubt_mix() -> Draw:
    """Not stated: only now, and seldom. Met before sentences are read, or often, it was the answer
    to everything, and reading was forgotten.
    """
    return mix(
        scattered(8, 4, whole=True, absent=1),
        alike(8, 1),
        alike(8, 3),
        bridged(3),
        bridged(3, 2, "shuffled"),
        worlds((6, 8), ONE_HOP, PLAIN, 0, most_not_stated=2),
        worlds((6, 8), ONE_HOP, PLAIN, 0, most_not_stated=3),
        worlds((4, 6), TOLD, PLAIN, most_not_stated=2),
        worlds((4, 6), TOLD, PLAIN, most_not_stated=3),
    )


def _wording_mix() -> Draw:
    return mix(
        bridged(3),
        bridged(3, style=WORDED),
        bridged(3, 2, "shuffled", style=WORDED),
        bridged(3, 1, "shuffled", style=VARIED),
        alike(8, 2, WORDED),
        alike(6, 1, SECOND),
        alike(6, 2, VARIED),
        compared(3),
        compared(4, VARIED),
        worlds((6,), ONE_HOP, WORDED, 0, most_not_stated=3),
        worlds((6,), ONE_HOP, VARIED, 0, most_not_stated=3),
        worlds((4, 6), QUESTION_KINDS, VARIED, most_not_stated=3),
        worlds((4, 6), QUESTION_KINDS, VARIED, most_not_stated=3),
    )


def _whole_mix() -> Draw:
    every = worlds(tuple(range(1, 9)), QUESTION_KINDS, VARIED)
    return mix(
        *(every,) * 6,
        worlds((6,), ONE_HOP, VARIED, 0),
        bridged(3, 1, "shuffled", style=VARIED),
        bridged(3, 2, "shuffled", style=VARIED),
        in_order(),
        in_order(),
        compared(3, VARIED),
        compared(4, VARIED),
        without_documents(),
    )


def _longest_mix() -> Draw:
    """Mostly two hops, which longer documents take from a reader first. A step costs what its
    documents are long."""
    return mix(
        worlds(tuple(range(1, 9)), QUESTION_KINDS, VARIED),
        worlds((4, 6), QUESTION_KINDS, VARIED, num_sentences=2, most_not_stated=4),
        worlds((4, 6), QUESTION_KINDS, VARIED, num_sentences=4, most_not_stated=4),
        worlds((4, 6), QUESTION_KINDS, VARIED, num_sentences=8, most_not_stated=4),
        worlds((6,), QUESTION_KINDS, VARIED, num_sentences=8, most_not_stated=4),
        bridged(3, style=VARIED, num_sentences=2),
        bridged(3, style=VARIED, num_sentences=4),
        bridged(2, 2, "shuffled", style=VARIED, num_sentences=4),
        bridged(3, style=VARIED, num_sentences=8),
        bridged(2, 2, "shuffled", style=VARIED, num_sentences=8),
        run=LONGER_BATCH,
    )


def _longer_mix() -> Draw:
    return mix(
        worlds(tuple(range(1, 9)), QUESTION_KINDS, VARIED),
        worlds((4, 6), QUESTION_KINDS, VARIED, num_sentences=2, most_not_stated=4),
        worlds((4, 6), QUESTION_KINDS, VARIED, num_sentences=4, most_not_stated=4),
        worlds((6,), STATED, VARIED, num_sentences=4),
        bridged(3, style=VARIED, num_sentences=2),
        bridged(3, style=VARIED, num_sentences=4),
        bridged(3, 0, "shuffled", style=VARIED, num_sentences=4),
        bridged(2, 2, "shuffled", style=VARIED, num_sentences=4),
        bridged(2, 2, "shuffled", style=VARIED, num_sentences=4),
        run=LONGER_BATCH,
    )
