"""What can be true in a world, and the English for saying and asking it.

In wordings `{s}` is the subject and `{v}` the value. A wording that begins with `{s}` can also have
a pronoun there. Data only.
"""

from dataclasses import dataclass
from typing import Literal

from duetto.evals.worlds.names import ThingKind

ValueKind = ThingKind | Literal["year"]


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation, and how it is told and asked."""

    name: str
    subject: ThingKind
    value: ValueKind
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bridge:
    """A relation whose value a later document goes on about without naming it."""

    relation: Relation
    roles: tuple[str, ...]  # how a later document calls the value
    descriptions: tuple[str, ...]  # how a question calls it, by way of the subject
    value: ThingKind = "person"


FOUNDER = Relation(
    "founder", "company", "person",
    ("{s} was founded by {v}.", "{v} founded {s}.", "{s} was set up by {v}.",
     "{v} is the founder of {s}."),
    ("Who founded {s}?", "Who is the founder of {s}?"),
)  # fmt: skip
BASE = Relation(
    "base", "company", "town",
    ("{s} is based in {v}.", "{s} has its head office in {v}.", "{s} works from {v}."),
    ("Where is {s} based?", "In which town is {s} based?"),
)  # fmt: skip
MAKES = Relation(
    "makes", "company", "product",
    ("{s} makes the {v}.", "{s} sells the {v}.", "{s} is known for the {v}."),
    ("What does {s} make?", "Which product does {s} sell?"),
)  # fmt: skip
FOUNDED_IN = Relation(
    "founded_in", "company", "year",
    ("{s} was founded in {v}.", "{s} dates from {v}.", "{s} opened its doors in {v}."),
    ("When was {s} founded?", "In which year was {s} founded?"),
)  # fmt: skip
HOME = Relation(
    "home", "person", "town",
    ("{s} lives in {v}.", "{s} has a house in {v}.", "{s} makes a home in {v}."),
    ("Where does {s} live?", "In which town does {s} live?"),
)  # fmt: skip
BIRTHPLACE = Relation(
    "birthplace", "person", "town",
    ("{s} was born in {v}.", "{s} comes from {v}.", "{s} grew up in {v}."),
    ("Where was {s} born?", "Which town does {s} come from?"),
)  # fmt: skip
OWNS = Relation(
    "owns", "person", "product",
    ("{s} owns a {v}.", "{s} uses a {v} every day.", "{s} bought a {v}."),
    ("What does {s} own?", "Which product does {s} own?"),
)  # fmt: skip
MAYOR = Relation(
    "mayor", "town", "person",
    ("{s} has {v} as its mayor.", "The mayor of {s} is {v}.", "{v} is the mayor of {s}.",
     "{s} elected {v} as mayor."),
    ("Who is the mayor of {s}?", "Who did {s} elect as mayor?"),
)  # fmt: skip
DESIGNER = Relation(
    "designer", "product", "person",
    ("The {s} was designed by {v}.", "{v} designed the {s}.", "{v} is the designer of the {s}."),
    ("Who designed the {s}?", "Who is the designer of the {s}?"),
)  # fmt: skip
MAKER = Relation(
    "maker", "product", "company",
    ("The {s} is made by {v}.", "{v} builds the {s}.", "The {s} comes from the factory of {v}."),
    ("Who makes the {s}?", "Which company makes the {s}?"),
)  # fmt: skip
HOST = Relation(
    "host", "event", "person",
    ("The {s} was hosted by {v}.", "{v} hosted the {s}.", "The host of the {s} was {v}."),
    ("Who hosted the {s}?", "Who was the host of the {s}?"),
)  # fmt: skip
VENUE = Relation(
    "venue", "event", "town",
    ("The {s} takes place in {v}.", "The {s} is held in {v}.", "People come to {v} for the {s}."),
    ("Where does the {s} take place?", "In which town is the {s} held?"),
)  # fmt: skip
FIRST_HELD = Relation(
    "first_held", "event", "year",
    ("The {s} was first held in {v}.", "The {s} goes back to {v}.", "The {s} began in {v}."),
    ("When was the {s} first held?", "In which year did the {s} begin?"),
)  # fmt: skip

RELATIONS: tuple[Relation, ...] = (
    FOUNDER, BASE, MAKES, FOUNDED_IN, HOME, BIRTHPLACE, OWNS, MAYOR, DESIGNER, MAKER, HOST, VENUE,
    FIRST_HELD,
)  # fmt: skip

BRIDGES: tuple[Bridge, ...] = (
    Bridge(FOUNDER, ("the founder",), ("the founder of {s}", "the person who founded {s}")),
    Bridge(MAYOR, ("the mayor",), ("the mayor of {s}",)),
    Bridge(
        DESIGNER, ("the designer",), ("the designer of the {s}", "the person who designed the {s}")
    ),
    Bridge(HOST, ("the host",), ("the host of the {s}", "the person who hosted the {s}")),
    Bridge(MAKER, ("the company", "the maker"), ("the maker of the {s}",), "company"),
    Bridge(VENUE, ("the town",), ("the town where the {s} is held",), "town"),
)

# Which is older? By kind of thing: the relation that tells the year, and how the question is put.
COMPARISONS: tuple[tuple[Relation, tuple[str, ...]], ...] = (
    (FOUNDED_IN, ("Which company is older, {a} or {b}?", "Which was founded first, {a} or {b}?")),
    (FIRST_HELD, ("Which event is older, the {a} or the {b}?",)),
)

# How a document goes on about the subject that it has named.
PRONOUNS: dict[ThingKind, tuple[str, ...]] = {
    "person": ("he", "she"),
    "company": ("it", "the company"),
    "town": ("it", "the town"),
    "product": ("it",),
    "event": ("it",),
}

YEARS = range(1900, 2000)
NOT_STATED = "not stated"
