"""The ladder: what each rung teaches, and the mark on held-out data that ends it.

From recall of single tokens to questions over several documents. Trained directly on the last, a
small model stays at chance for millions of tokens; each rung here is learned from the one before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from duetto.bench.worlds.names import BEGINNINGS, ENDINGS, KINDS, NameSource, Split
from duetto.bench.worlds.relations import YEARS
from duetto.bench.worlds.story import VARIED, Style
from duetto.bench.worlds.world import QUESTION_KINDS, QuestionKind, WorldOptions, draw_world
from training.sequences import Asked, TrainingSequence, from_world

Draw = Callable[[int, Split, Tokenizer], TrainingSequence]

PLAIN = Style(wordings=1, second_sentence=0.0)
DOUBT: tuple[QuestionKind, ...] = ("one_hop", "not_stated")
LAST_STEPS = 8000
RECALL_RATE = 2e-3
# Whatever an answer can end in. Years that were first met in sentences were the last to be learned.
VALUES = [*(e for kind in KINDS for e in ENDINGS[kind]), *(f" {year}" for year in YEARS)]
MAX_ASKED = 12  # questions per sequence; more make the batch's mask large


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    name: str
    draw: Draw  # the sequence of a seed, in a split
    marks: Mapping[str, float]  # exact match on held-out data, by kind of question
    batch_size: int = 32
    learning_rate: float = 1e-3  # at 2e-3 a climb over sentences fell back to chance once
    max_steps: int = 20_000  # without the mark by then, the climb stops
    decays: bool = False  # the last rung: all steps are taken, and the rate falls to zero


def ladder() -> tuple[Rung, ...]:
    recall = {"recall": 0.95}
    read = {"one_hop": 0.95}
    doubt = {"one_hop": 0.95, "not_stated": 0.80}
    whole = {"one_hop": 0.95, "two_hop": 0.85, "not_stated": 0.80}
    return (
        *(
            Rung(name=f"pairs-{n}", draw=_pairs(n), marks=recall, learning_rate=RECALL_RATE)
            for n in (4, 8, 16, 32)
        ),
        # With 4 names an ending alone says which in 93 of 100 cases; 16 teach to read both tokens.
        Rung(name="names-4", draw=_names(4), marks={"recall": 0.90}, learning_rate=RECALL_RATE),
        Rung(name="names-16", draw=_names(16), marks=recall, learning_rate=RECALL_RATE),
        *(
            Rung(name=f"sentences-{n}", draw=_worlds((n,), ("one_hop",), PLAIN, 0), marks=read)
            for n in (2, 4, 8)
        ),
        *(
            Rung(name=f"documents-{n}", draw=_worlds((n,), DOUBT, VARIED, 0), marks=doubt)
            for n in (2, 4, 6)
        ),
        Rung(name="two-hops-4-plain", draw=_worlds((4,), QUESTION_KINDS, PLAIN), marks=whole),
        *(
            Rung(name=f"two-hops-{n}", draw=_worlds((n,), QUESTION_KINDS, VARIED), marks=whole)
            for n in (4, 6)
        ),
        Rung(
            name="all",
            draw=_worlds(tuple(range(1, 9)), QUESTION_KINDS, VARIED),
            marks=whole,
            max_steps=LAST_STEPS,
            decays=True,
        ),
    )


def _pairs(count: int) -> Draw:
    """Single-token keys with single-token values; every key is asked, at most MAX_ASKED."""

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"pairs/{split}/{seed}")
        keys = [_one_token(tokenizer, f" {b}") for b in rng.sample(BEGINNINGS, count)]
        values = [_one_token(tokenizer, value) for value in rng.choices(VALUES, k=count)]
        shared = tuple(token for pair in zip(keys, values, strict=True) for token in pair)
        asked = rng.sample(range(count), min(count, 2 * MAX_ASKED))
        return TrainingSequence(
            (shared,), tuple(Asked("recall", (keys[i],), (values[i],)) for i in asked)
        )

    return draw


def _names(count: int) -> Draw:
    """Names with names, of two tokens each."""

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"names/{split}/{seed}")
        source = NameSource(rng, split)
        names = [
            tuple(tokenizer.encode(f" {source.draw(rng.choice(KINDS))}").ids)
            for _ in range(2 * count)
        ]
        keys, values = names[:count], names[count:]
        shared = tuple(t for key, value in zip(keys, values, strict=True) for t in key + value)
        asked = rng.sample(range(count), min(count, MAX_ASKED))
        return TrainingSequence(
            (shared,), tuple(Asked("recall", keys[i], values[i]) for i in asked)
        )

    return draw


def _worlds(
    sizes: tuple[int, ...],
    kinds: tuple[QuestionKind, ...],
    style: Style,
    num_pairs: int | None = None,
) -> Draw:
    """Worlds of one of these numbers of documents, with questions of these kinds."""

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"questions/{split}/{seed}")
        options = WorldOptions(
            num_documents=rng.choice(sizes),
            num_pairs=num_pairs,
            order="given" if rng.random() < 0.25 else "shuffled",
            style=style,
        )
        world = draw_world(seed, split, options)
        fitting = [q for q in world.questions if q.kind in kinds]
        rare = [q for q in fitting if q.kind in ("two_hop", "comparison")]
        others = [q for q in fitting if q not in rare]
        chosen = (rare + rng.sample(others, len(others)))[:MAX_ASKED]
        return from_world(world, chosen, tokenizer)

    return draw


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    (token,) = tokenizer.encode(text).ids
    return int(token)
