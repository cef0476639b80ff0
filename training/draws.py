"""What the rungs draw: training sequences as functions of a seed and a split.

Each `draw` here returns such a function. Held-out sequences hold names that training never does.
"""

import re
from collections.abc import Callable
from itertools import permutations
from random import Random

from tokenizers import Tokenizer

from duetto.evals.worlds.names import BEGINNINGS, ENDINGS, KINDS, NameSource, Split
from duetto.evals.worlds.prompt import REASON
from duetto.evals.worlds.relations import BRIDGES, COMPARISONS, NOT_STATED, RELATIONS, YEARS
from duetto.evals.worlds.story import StoryWriter, Style
from duetto.evals.worlds.world import (
    DocumentOrder,
    Question,
    QuestionKind,
    World,
    WorldOptions,
    compare,
    draw_world,
)
from training.sequences import Asked, TrainingSequence, asking, encode, from_world
from training.tokenizer import END, USER

Draw = Callable[[int, Split, Tokenizer], TrainingSequence]

PLAIN = Style(wordings=1, second_sentence=0.0)
MAX_ASKED = 12  # questions per sequence; more make the batch's mask large
NUM_ONE_HOP = 2  # beside two hops in `bridged`
RUN = 32  # neighbouring seeds of a mix that draw alike, so that a batch is hardly padded
# Whatever an answer can end in. Years that were first met in sentences were the last to be learned.
VALUES = [*(e for kind in KINDS for e in ENDINGS[kind]), *(f" {year}" for year in YEARS)]
# Between names: the words that stand there in sentences.
WORDS = sorted(
    {
        word
        for relation in RELATIONS
        for wording in relation.sentences + relation.questions
        for word in re.findall(r"\b[a-z]{2,}\b", wording)
    }
)
_ENDING = re.compile(
    rf"\b({'|'.join(BEGINNINGS)})(?:{'|'.join(e for kind in KINDS for e in ENDINGS[kind])})\b"
)

# How questions call what a bridge leads to; the group is the subject's name.
_DESCRIPTIONS = [
    (bridge, re.compile(description.replace("{s}", r"(\w+)")))
    for bridge in BRIDGES
    for description in bridge.descriptions
]


def mix(*draws: Draw, run: int = RUN) -> Draw:
    """One of these for every `run` seeds of training, and for every held-out seed."""

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        place = seed // run if split == "train" else seed
        return Random(f"mix/{place}").choice(draws)(seed, split, tokenizer)

    return draw


def pairs(count: int) -> Draw:
    """Single-token keys with single-token values; every key is asked, at most MAX_ASKED."""

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"pairs/{split}/{seed}")
        keys = [_one_token(tokenizer, f" {b}") for b in rng.sample(BEGINNINGS, count)]
        values = [_one_token(tokenizer, value) for value in rng.choices(VALUES, k=count)]
        shared = tuple(token for pair in zip(keys, values, strict=True) for token in pair)
        asked = rng.sample(range(count), min(count, MAX_ASKED))
        return TrainingSequence(
            (shared,), tuple(Asked("recall", (keys[i],), (values[i],)) for i in asked)
        )

    return draw


def scattered(count: int, most: int, *, whole: bool, absent: int = 0) -> Draw:
    """Names with names, and up to `most` words after each of them, also in the question.

    `whole`: names of two tokens; else only their beginnings. `absent`: so many questions are about
    names that nothing is told of.
    """

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"scattered/{split}/{seed}")
        source = NameSource(rng, split)

        def name() -> tuple[int, ...]:
            tokens = encode(tokenizer, f" {source.draw(rng.choice(KINDS))}")
            return tokens if whole else tokens[:1]

        def words() -> tuple[int, ...]:
            chosen = rng.choices(WORDS, k=rng.randint(0, most))
            return encode(tokenizer, "".join(f" {word}" for word in chosen))

        told = [(name(), name()) for _ in range(count)]
        shared = tuple(t for key, value in told for t in key + words() + value + words())
        missing = encode(tokenizer, f" {NOT_STATED}")
        asked = [("recall", *pair) for pair in rng.sample(told, min(count, MAX_ASKED - absent))]
        asked += [("not_stated", name(), missing) for _ in range(absent)]
        return TrainingSequence(
            (shared,), tuple(Asked(kind, words() + key + words(), v) for kind, key, v in asked)
        )

    return draw


def alike(count: int, num_relations: int, style: Style = PLAIN, *, whole: bool = True) -> Draw:
    """So many documents of so few relations that only names tell them apart; one hop."""
    options = WorldOptions(
        num_documents=count, num_pairs=0, num_relations=num_relations, style=style
    )

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        world = draw_world(seed, split, options)
        fitting = [q for q in world.questions if q.kind == "one_hop"]
        chosen = Random(seed).sample(fitting, min(len(fitting), MAX_ASKED))
        if not whole:
            world, chosen = _beginnings_only(world, chosen)
        return from_world(world, chosen, tokenizer)

    return draw


def retold(count: int, num_relations: int, *, whole: bool = True) -> Draw:
    """Documents as in `alike`, each told again up to its value, which is to be told."""
    options = WorldOptions(
        num_documents=count, num_pairs=0, num_relations=num_relations, style=PLAIN
    )

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        world = draw_world(seed, split, options)
        chosen = [q for q in world.questions if q.kind == "one_hop"]
        if not whole:
            world, chosen = _beginnings_only(world, chosen)
        asked = []
        for question in chosen:
            answer = f" {question.answer}"
            before, _, _ = world.documents[question.support[0]].partition(answer)
            prompt = encode(tokenizer, f"Document: {before}")
            asked.append(Asked("recall", prompt, encode(tokenizer, answer)))
        return TrainingSequence(from_world(world, (), tokenizer).parts, tuple(asked))

    return draw


def bridged(
    num_pairs: int,
    num_others: int = 0,
    order: DocumentOrder = "given",
    style: Style = PLAIN,
    num_sentences: int = 1,
) -> Draw:
    """Pairs that only names and order tell apart: two hops, their second hops alone, and a few
    of one hop.

    A second hop ("Where does Tovard live?") binds the sequel to what it means. It is learned in no
    time after `alike`, and two hops after it; without it, two hops stayed at guessing.
    """
    options = WorldOptions(
        num_documents=2 * num_pairs + num_others,
        num_pairs=num_pairs,
        has_pairs_alike=True,
        num_sentences=num_sentences,
        order=order,
        style=style,
    )

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        world = draw_world(seed, split, options)
        two = [q for q in world.questions if q.kind == "two_hop"]
        one = [q for q in world.questions if q.kind == "one_hop"]
        second = [_second_hop(q, one) for q in two]
        few = Random(seed).sample(one, min(len(one), NUM_ONE_HOP))
        return from_world(world, two + second + few, tokenizer)

    return draw


def worlds(
    sizes: tuple[int, ...],
    kinds: tuple[QuestionKind, ...],
    style: Style,
    num_pairs: int | None = None,
    most_not_stated: int = MAX_ASKED,
    num_sentences: int = 1,
) -> Draw:
    """Worlds of one of these numbers of documents, with questions of these kinds.

    `num_sentences`: of each document, with those that are beside the point.
    """

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"questions/{split}/{seed}")
        options = WorldOptions(
            num_documents=rng.choice(sizes),
            num_pairs=num_pairs,
            num_sentences=num_sentences,
            order="given" if rng.random() < 0.25 else "shuffled",
            style=style,
        )
        world = draw_world(seed, split, options)
        fitting = [q for q in world.questions if q.kind in kinds]
        rare = [q for q in fitting if q.kind in ("two_hop", "comparison")]
        common = [q for q in fitting if q.kind == "one_hop"]
        missing = [q for q in fitting if q.kind == "not_stated"]
        others = common + rng.sample(missing, min(len(missing), most_not_stated))
        chosen = (rare + rng.sample(others, len(others)))[:MAX_ASKED]
        return from_world(world, chosen, tokenizer)

    return draw


def compared(count: int, style: Style = PLAIN) -> Draw:
    """Documents that tell the years of so many things of a kind, and which of two is the older."""

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"compared/{split}/{seed}")
        writer = StoryWriter(rng, split, style)
        relation, wordings = rng.choice(COMPARISONS)
        documents = [writer.alone(frozenset(), relation) for _ in range(count)]
        facts = list(enumerate(document.facts[0] for document in documents))
        couples = list(permutations(facts, 2))
        questions = [
            compare(a, b, writer.ask(wordings), (i, j))
            for (i, a), (j, b) in rng.sample(couples, min(len(couples), MAX_ASKED))
            if a.value != b.value
        ]
        world = World(tuple(document.text for document in documents), tuple(questions))
        return from_world(world, questions, tokenizer)

    return draw


def in_order() -> Draw:
    """Both years are said already, in the beginning of the answer: which thing is the older?

    In `compared` this one token is a tenth of an answer, and stayed at guessing.
    """

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        rng = Random(f"in order/{split}/{seed}")
        writer = StoryWriter(rng, split, PLAIN)
        relation, wordings = rng.choice(COMPARISONS)
        facts = [writer.alone(frozenset(), relation).facts[0] for _ in range(2 * MAX_ASKED)]
        asked = []
        for a, b in zip(facts[::2], facts[1::2], strict=True):
            if a.value == b.value:
                continue
            question = compare(a, b, rng.choice(wordings), ())
            said = f"{asking(question)} {question.reason}{REASON.rstrip()}"
            answer = encode(tokenizer, f" {question.answer}{END}")
            asked.append(Asked("order", encode(tokenizer, said), answer))
        return TrainingSequence((encode(tokenizer, f"{USER}\n"),), tuple(asked))

    return draw


def without_documents() -> Draw:
    """Questions of all kinds with nothing to read: not stated."""

    def draw(seed: int, split: Split, tokenizer: Tokenizer) -> TrainingSequence:
        world = draw_world(seed, split, WorldOptions())
        asked = Random(seed).sample(world.questions, min(len(world.questions), MAX_ASKED))
        nothing = [Question("not_stated", q.text, NOT_STATED, ()) for q in asked]
        return from_world(World((), tuple(nothing)), nothing, tokenizer)

    return draw


def _second_hop(question: Question, one_hop: list[Question]) -> Question:
    """A question of two hops with the name in the place of its description."""
    first_hops = {
        bridge_question.replace("{s}", found[1])
        for bridge, description in _DESCRIPTIONS
        if (found := description.search(question.text))
        for bridge_question in bridge.relation.questions
    }
    (name,) = {q.answer for q in one_hop if q.text in first_hops}
    text = question.text
    for _, description in _DESCRIPTIONS:
        text = description.sub(name, text)
    return Question("one_hop", text, question.answer, ())


def _beginnings_only(world: World, questions: list[Question]) -> tuple[World, list[Question]]:
    """The same with every name cut to its first token."""

    def cut(text: str) -> str:
        return _ENDING.sub(r"\1", text)

    shorter = [Question(q.kind, cut(q.text), cut(q.answer), q.support) for q in questions]
    return World(tuple(cut(d) for d in world.documents), tuple(shorter)), shorter


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    (token,) = encode(tokenizer, text)
    return token
