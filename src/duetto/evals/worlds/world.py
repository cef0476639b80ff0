"""A world: documents in an order, and every question that can be asked about them.

All of it is a function of the seed, the split and the options. Knows no prompts and no models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal, get_args

from duetto.evals.worlds.names import BEGINNINGS, Split, ThingKind
from duetto.evals.worlds.prompt import REASON
from duetto.evals.worlds.relations import (
    BRIDGES,
    COMPARISONS,
    NOT_STATED,
    RELATIONS,
    Relation,
)
from duetto.evals.worlds.story import (
    VARIED,
    Document,
    DocumentPair,
    Fact,
    StoryWriter,
    Style,
    Thing,
    continuations,
    telling,
)

QuestionKind = Literal["one_hop", "two_hop", "comparison", "not_stated"]
DocumentOrder = Literal["shuffled", "given"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
ORDERS: tuple[DocumentOrder, ...] = get_args(DocumentOrder)
REPEATED = 0.7  # how often a document tells the relation of another
MAX_DOCUMENTS = 12  # with the names that begin differently
MAX_SENTENCES = len(BEGINNINGS) // 2  # of all documents: each names two new things at most

HOPS: dict[QuestionKind, int] = {"one_hop": 1, "two_hop": 2, "comparison": 2, "not_stated": 0}


@dataclass(frozen=True, slots=True)
class Question:
    """A question and what is to be said to it.

    `reason` is what the answer follows from, said before it: of two hops where the first leads, of
    a comparison both years. A small model that says it needs one lookup at a time.
    """

    kind: QuestionKind
    text: str
    answer: str
    support: tuple[int, ...]  # places of the documents that it takes; none if not stated
    reason: str = ""

    @property
    def full_answer(self) -> str:
        return f"{self.reason}{REASON}{self.answer}" if self.reason else self.answer


@dataclass(frozen=True, slots=True)
class World:
    documents: tuple[str, ...]
    questions: tuple[Question, ...]  # all that can be asked, each once


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldOptions:
    """What worlds to draw. `num_pairs` None: about a third of the documents begin a pair.

    `num_relations`: documents outside of pairs tell at most so many different first relations.
    `has_pairs_alike`: all pairs have the same two relations, not only the first two.
    `num_sentences`: each document has at least so many, most of them beside the point. The facts,
    the questions and their answers are those of the world without them.
    """

    num_documents: int = 6
    num_pairs: int | None = None
    num_relations: int | None = None
    has_pairs_alike: bool = False
    num_sentences: int = 1
    order: DocumentOrder = "shuffled"
    style: Style = VARIED

    def __post_init__(self) -> None:
        if not 1 <= self.num_documents <= MAX_DOCUMENTS:
            raise ValueError(f"num_documents {self.num_documents}: must be 1 to {MAX_DOCUMENTS}")
        if self.num_pairs is not None and not 0 <= 2 * self.num_pairs <= self.num_documents:
            raise ValueError(
                f"num_pairs {self.num_pairs}: must be 0 to {self.num_documents // 2} "
                f"for {self.num_documents} documents"
            )
        if self.num_relations is not None and self.num_relations < 1:
            raise ValueError(f"num_relations {self.num_relations}: must be 1 or more")
        most = max_sentences(self.num_documents)
        if not 1 <= self.num_sentences <= most:
            raise ValueError(
                f"num_sentences {self.num_sentences}: must be 1 to {most} "
                f"for {self.num_documents} documents"
            )


def max_sentences(num_documents: int) -> int:
    """How many sentences each of so many documents can have."""
    return MAX_SENTENCES // num_documents


def draw_world(seed: int, split: Split, options: WorldOptions) -> World:
    """The world of this seed. Worlds of different splits share no name and no document."""
    rng = Random(f"{split}/{seed}/{options.num_documents}/{options.order}")
    writer = StoryWriter(rng, split, options.style)
    pairs = _draw_pairs(writer, _num_pairs(rng, options), options.has_pairs_alike)
    num_others = options.num_documents - 2 * len(pairs)
    others = _draw_others(writer, pairs, num_others, options.num_relations)
    documents = _ordered(rng, pairs, others, options.order)
    questions = tuple(_Questions(writer, pairs, documents).all())
    # Last, so that longer documents change nothing of what is drawn before.
    banned = _banned(pairs)
    told = [writer.lengthened(d, options.num_sentences, banned) for d in documents]
    return World(tuple(d.text for d in told), questions)


def _num_pairs(rng: Random, options: WorldOptions) -> int:
    if options.num_pairs is not None:
        return options.num_pairs
    most = options.num_documents // 2
    return most if most < 2 else rng.randint(2, min(most, 3))


def _draw_pairs(writer: StoryWriter, count: int, all_alike: bool) -> list[DocumentPair]:
    """Pairs that go on about things of one kind, the first two (or all) in the same way."""
    if count == 0:
        return []
    first = writer.rng.choice(BRIDGES)
    continued = writer.rng.choice(continuations(first))
    pairs = [writer.pair(first, continued) for _ in range(count if all_alike else min(count, 2))]
    alike = [bridge for bridge in BRIDGES if bridge.value == first.value]
    for _ in range(count - len(pairs)):
        bridge = writer.rng.choice([first, *alike])
        pairs.append(writer.pair(bridge, writer.rng.choice([continued, *continuations(bridge)])))
    return pairs


def _banned(pairs: list[DocumentPair]) -> frozenset[ThingKind]:
    """Kinds of what a pair's second document could mean: nothing outside of pairs is of them."""
    return frozenset(pair.bridge.value for pair in pairs)


def _draw_others(
    writer: StoryWriter, pairs: list[DocumentPair], count: int, num_relations: int | None
) -> list[Document]:
    """Documents that stand alone and hold nothing that a pair's second document could mean.

    They often tell the same relation of other things: where each relation occurs once, the words of
    a question find its document, and a model learns to leave the names unread.
    """
    banned = _banned(pairs)
    fitting, told = telling(banned), list[Relation]()
    if num_relations is not None:
        fitting = writer.rng.sample(fitting, min(num_relations, len(fitting)))
    for _ in range(count):
        repeats = told and writer.rng.random() < REPEATED
        told.append(writer.rng.choice(told if repeats else fitting))
    return [writer.alone(banned, relation) for relation in told]


def _ordered(
    rng: Random, pairs: list[DocumentPair], others: list[Document], order: DocumentOrder
) -> list[Document]:
    """Every second document of a pair means the latest fitting thing before it, in each order."""
    if order == "given":
        return [d for pair in pairs for d in (pair.opening, pair.sequel)] + others
    documents = []
    for pair in rng.sample(pairs, len(pairs)):
        documents += [pair.opening, pair.sequel]
    for document in others:
        documents.insert(rng.randint(0, len(documents)), document)
    return documents


@dataclass(frozen=True, slots=True)
class _Questions:
    """Everything that can be asked about some documents."""

    writer: StoryWriter
    pairs: list[DocumentPair]
    documents: list[Document]

    def all(self) -> Iterator[Question]:
        yield from self._one_hop()
        yield from self._two_hop()
        yield from self._comparisons()
        yield from self._not_stated()

    def _one_hop(self) -> Iterator[Question]:
        for place, document in enumerate(self.documents):
            if document.refers_to is None:
                for fact in document.facts:
                    yield self._question("one_hop", fact, fact.subject, (place,))

    def _two_hop(self) -> Iterator[Question]:
        for pair in self._ambiguous():
            support = (self._place(pair.opening), self._place(pair.sequel))
            fact, description = pair.sequel.facts[0], self._description(pair)
            yield self._question("two_hop", fact, description, support, pair.fact.answer)

    def _comparisons(self) -> Iterator[Question]:
        for relation, wordings in COMPARISONS:
            told = [
                (fact, place)
                for place, document in enumerate(self.documents)
                for fact in document.facts
                if fact.relation is relation
            ]
            for (a, place_a), (b, place_b) in pairwise(told):
                if a.value != b.value:
                    yield compare(a, b, self.writer.ask(wordings), (place_a, place_b))

    def _not_stated(self) -> Iterator[Question]:
        """Of what is named: what no document tells. Of what is not: anything."""
        told = {(f.subject, f.relation.name) for d in self.documents for f in d.facts}
        things = dict.fromkeys(fact.subject for d in self.documents for fact in d.facts)
        named = [t for t in things if all(t != pair.fact.value for pair in self.pairs)]
        for thing in named:
            yield from self._missing(thing, told)
        for pair in self.pairs:
            for relation in continuations(pair.bridge):
                value = pair.fact.value
                if (value, relation.name) not in told:
                    yield self._unanswered(relation, self._description(pair), str(value))
        stranger = self.writer.thing(self.writer.rng.choice(list(things)).kind)
        yield from self._missing(stranger, told)

    def _missing(self, thing: Thing, told: set[tuple[Thing, str]]) -> Iterator[Question]:
        """A question about the thing that no document answers, if there is one."""
        of_kind = [r for r in RELATIONS if r.subject == thing.kind]
        relations = [r for r in of_kind if (thing, r.name) not in told]
        if relations:
            yield self._unanswered(self.writer.rng.choice(relations), str(thing))

    def _ambiguous(self) -> list[DocumentPair]:
        """Pairs of which another has the same bridge and relation; with one pair, that one."""
        forms = [(p.bridge.relation.name, p.sequel.facts[0].relation.name) for p in self.pairs]
        if len(self.pairs) == 1:
            return self.pairs
        return [p for p, form in zip(self.pairs, forms, strict=True) if forms.count(form) > 1]

    def _description(self, pair: DocumentPair) -> str:
        return self.writer.ask(pair.bridge.descriptions).format(s=pair.fact.subject)

    def _question(
        self,
        kind: QuestionKind,
        fact: Fact,
        subject: Thing | str,
        support: tuple[int, ...],
        reason: str = "",
    ) -> Question:
        text = _filled(self.writer.ask(fact.relation.questions), str(subject))
        return Question(kind, text, fact.answer, tuple(sorted(support)), reason)

    def _unanswered(self, relation: Relation, subject: str, reason: str = "") -> Question:
        text = _filled(self.writer.ask(relation.questions), subject)
        return Question("not_stated", text, NOT_STATED, (), reason)

    def _place(self, document: Document) -> int:
        return next(i for i, d in enumerate(self.documents) if d is document)


def compare(a: Fact, b: Fact, wording: str, support: tuple[int, ...]) -> Question:
    """Which of two facts of one year-telling relation is the older one."""
    text = wording.format(a=a.subject, b=b.subject)
    older = a if int(a.answer) < int(b.answer) else b
    reason = f"{a.subject} {a.answer}, {b.subject} {b.answer}"
    return Question("comparison", text, str(older.subject), support, reason)


def _filled(wording: str, subject: str) -> str:
    """The question about a subject, which may come with an article of its own."""
    if subject.startswith("the "):
        wording = wording.replace("the {s}", "{s}")
    return wording.format(s=subject)
