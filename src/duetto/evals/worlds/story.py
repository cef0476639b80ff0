"""Writes documents: facts about one thing each, in English, and which of them are asked about.

A document *opens* a pair (names a thing and tells who founded it, say), *goes on* about what an
opening named, without naming it, or stands *alone*. Knows no order of documents and no questions.
"""

from dataclasses import dataclass, field, replace
from random import Random

from duetto.evals.worlds.names import Name, NameSource, Split, ThingKind
from duetto.evals.worlds.relations import (
    MAKES,
    PRONOUNS,
    RELATIONS,
    YEARS,
    Bridge,
    Relation,
    ValueKind,
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One person, company, town, product or event."""

    kind: ThingKind
    name: Name
    pronoun: str | None = None  # of a person

    def __str__(self) -> str:
        return str(self.name)


@dataclass(frozen=True, slots=True)
class Fact:
    subject: Thing
    relation: Relation
    value: Thing | int  # int: a year

    @property
    def answer(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the facts that it tells. Names of `refers_to` do not occur in it."""

    text: str
    facts: tuple[Fact, ...]
    refers_to: Thing | None = None


@dataclass(frozen=True, slots=True)
class DocumentPair:
    """An opening, which tells `bridge`, and a document that goes on about its value."""

    opening: Document
    sequel: Document
    bridge: Bridge
    fact: Fact  # the opening's, of the bridge's relation


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How varied the writing is; training starts plain."""

    wordings: int | None = None  # the first so many of each relation; None: all
    second_sentence: float = 0.5  # how often a document tells a second fact
    value_first: bool = False  # also "Gormund founded Fenlux", where the value comes first


VARIED = Style()


@dataclass(slots=True)
class StoryWriter:
    """Draws things and facts, and writes documents about them."""

    rng: Random
    split: Split
    style: Style
    names: NameSource = field(init=False)

    def __post_init__(self) -> None:
        self.names = NameSource(self.rng, self.split)

    def pair(self, bridge: Bridge, continued: Relation) -> DocumentPair:
        subject = self.thing(bridge.relation.subject)
        value = self.thing(bridge.value)
        fact = Fact(subject, bridge.relation, value)
        more = self._second(subject, bridge.relation, avoided={value.kind})
        opening = self._document([fact, *more])
        told = [self._fact(value, continued)]
        told += self._second(value, continued, avoided={value.kind, "year"})
        call = self.rng.choice(bridge.roles + ((value.pronoun,) if value.pronoun else ()))
        return DocumentPair(opening, self._document(told, call), bridge, fact)

    def alone(self, banned: frozenset[ThingKind], relation: Relation) -> Document:
        """A document about something new that holds nothing of the banned kinds."""
        subject = self.thing(relation.subject)
        more = self._second(subject, relation, avoided=set(banned))
        return self._document([self._fact(subject, relation), *more])

    def lengthened(
        self, document: Document, num_sentences: int, banned: frozenset[ThingKind]
    ) -> Document:
        """The document with so many sentences, or with its own if it has as many: the others are
        beside the point.

        They tell of other things, which no question is about, and hold nothing of the banned kinds.
        None comes between the document's own, whose pronouns mean what stands before them.
        """
        others: list[str] = []
        missing = num_sentences - len(document.facts)
        while missing > 0:
            beside = self._beside(banned, missing)
            others.append(beside.text)
            missing -= len(beside.facts)
        place = self.rng.randint(0, len(others))
        text = " ".join([*others[:place], document.text, *others[place:]])
        return replace(document, text=text)

    def thing(self, kind: ThingKind) -> Thing:
        pronoun = self.rng.choice(PRONOUNS[kind]) if kind == "person" else None
        return Thing(kind, self.names.draw(kind), pronoun)

    def ask(self, wordings: tuple[str, ...]) -> str:
        return self.rng.choice(wordings[: self.style.wordings])

    def _beside(self, banned: frozenset[ThingKind], max_facts: int) -> Document:
        """All that can be told of something new, up to so many facts."""
        fitting = telling(banned)
        first = self.rng.choice(fitting)
        more = [r for r in fitting if r.subject == first.subject and r is not first]
        told = [first, *self.rng.sample(more, len(more))][:max_facts]
        subject = self.thing(first.subject)
        return self._document([self._fact(subject, relation) for relation in told])

    def _fact(self, subject: Thing, relation: Relation) -> Fact:
        if relation.value == "year":
            return Fact(subject, relation, self.rng.choice(YEARS))
        return Fact(subject, relation, self.thing(relation.value))

    def _second(self, subject: Thing, first: Relation, avoided: set[ValueKind]) -> list[Fact]:
        """Another fact about the subject, or none."""
        fitting = [
            relation
            for relation in RELATIONS
            if relation.subject == subject.kind
            and relation is not first
            and relation.value not in avoided
        ]
        if not fitting or self.rng.random() >= self.style.second_sentence:
            return []
        return [self._fact(subject, self.rng.choice(fitting))]

    def _document(self, facts: list[Fact], call: str | None = None) -> Document:
        """The facts, all about one thing. `call`: how it is called, if it is not to be named."""
        sentences = [self._sentence(facts[0], call)]
        for fact in facts[1:]:
            again = fact.subject.pronoun or self.rng.choice(PRONOUNS[fact.subject.kind])
            sentences.append(self._sentence(fact, again))
        unnamed = facts[0].subject if call else None
        return Document(" ".join(sentences), tuple(facts), unnamed)

    def _sentence(self, fact: Fact, call: str | None) -> str:
        wordings = fact.relation.sentences
        if call is None:
            if not self.style.value_first:
                wordings = tuple(w for w in wordings if w.index("{s}") < w.index("{v}"))
            text = self.rng.choice(wordings[: self.style.wordings])
            return text.format(s=fact.subject, v=fact.value)
        leading = [w.removeprefix("The ") for w in wordings]
        fitting = [w for w in leading if w.startswith("{s}")][: self.style.wordings]
        text = self.rng.choice(tuple(fitting)).format(s=call, v=fact.value)
        return text[0].upper() + text[1:]


def telling(banned: frozenset[ThingKind]) -> list[Relation]:
    """Relations that involve nothing of these kinds."""
    return [r for r in RELATIONS if r.subject not in banned and r.value not in banned]


def continuations(bridge: Bridge) -> list[Relation]:
    """What a later document can tell about the value of a bridge: always something with a name.

    Not what a company makes: the bridge to a company already tells one thing that it makes.
    """
    kind = bridge.value
    return [r for r in RELATIONS if r.subject == kind and r is not MAKES and r.value != "year"]
