"""Worlds: the splits share nothing, answers are what the documents say, and two hops need order."""

import re
import subprocess
import sys
from collections import Counter
from itertools import product
from random import Random

import pytest

from duetto.evals.worlds.names import KINDS, all_names
from duetto.evals.worlds.relations import BRIDGES, NOT_STATED, RELATIONS, YEARS
from duetto.evals.worlds.story import VARIED, StoryWriter, Style, continuations
from duetto.evals.worlds.world import (
    MAX_DOCUMENTS,
    ORDERS,
    QUESTION_KINDS,
    WorldOptions,
    draw_world,
    max_sentences,
)

SIZES = (1, 2, 3, 4, 6, MAX_DOCUMENTS)
NAMES = {
    split: {str(n) for kind in KINDS for n in all_names(kind, split)} for split in ("train", "eval")
}
EVERY_NAME = NAMES["train"] | NAMES["eval"]


def worlds(split="eval", count=40, sizes=SIZES, **options):
    for size, order, seed in product(sizes, ORDERS, range(count)):
        yield draw_world(seed, split, WorldOptions(num_documents=size, order=order, **options))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def names_in(text: str) -> set[str]:
    return words(text) & EVERY_NAME


def test_a_world_is_a_function_of_its_seed() -> None:
    options = WorldOptions()
    assert draw_world(5, "eval", options) == draw_world(5, "eval", options)
    assert draw_world(5, "eval", options) != draw_world(6, "eval", options)
    script = (
        "from duetto.evals.worlds.world import *;"
        "print(draw_world(5, 'eval', WorldOptions()).documents)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True,
        env={"PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert shown.stdout.strip() == str(draw_world(5, "eval", options).documents)


def test_worlds_need_the_standard_library_only() -> None:
    """Training and evaluation both import them, whatever else is installed."""
    script = (
        "import sys; before = set(sys.modules)\n"
        "import duetto.evals.worlds.world, duetto.evals.worlds.prompt\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - {'duetto'}\n"
        "assert new <= sys.stdlib_module_names, new"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_word_of_the_language_is_a_name() -> None:
    told = " ".join(s for r in RELATIONS for s in (*r.sentences, *r.questions))
    asked = " ".join(d for b in BRIDGES for d in (*b.roles, *b.descriptions))
    assert not names_in(f"{told} {asked} {NOT_STATED}")


def test_the_splits_share_no_name_and_no_document() -> None:
    documents = {}
    for split, other in (("train", "eval"), ("eval", "train")):
        drawn = list(worlds(split))
        documents[split] = {d for world in drawn for d in world.documents}
        for document in documents[split]:
            assert names_in(document), "a document without a name could occur in both"
        spoken = {q.text + " " + q.full_answer for world in drawn for q in world.questions}
        assert not words(" ".join(documents[split] | spoken)) & NAMES[other]
    assert not documents["train"] & documents["eval"]


@pytest.mark.parametrize("size", SIZES)
def test_as_many_documents_as_asked_for(size) -> None:
    assert all(len(world.documents) == size for world in worlds(sizes=(size,)))


def test_all_kinds_of_questions_come_up() -> None:
    kinds = Counter(q.kind for world in worlds(sizes=(6,)) for q in world.questions)
    assert set(kinds) == set(QUESTION_KINDS)


def test_questions_of_a_world_differ() -> None:
    for world in worlds():
        texts = [q.text for q in world.questions]
        assert len(set(texts)) == len(texts)


def test_one_hop_is_answered_inside_one_document() -> None:
    for world in worlds():
        for question in world.questions:
            if question.kind == "one_hop":
                (place,) = question.support
                text = world.documents[place]
                assert question.answer in words(text)
                assert names_in(question.text) <= names_in(text)


def test_the_words_of_a_one_hop_question_seldom_say_which_document() -> None:
    """Another document tells the same of something else, so that names must be read."""
    alike = total = 0
    for world in worlds(sizes=(6,)):
        for question in world.questions:
            if question.kind == "one_hop":
                (place,) = question.support
                told = world.documents[place].split(". ")
                sentence = next(s for s in told if question.answer in words(s))
                shape = words(sentence) - EVERY_NAME - set(map(str, YEARS))
                others = [d for i, d in enumerate(world.documents) if i != place]
                alike += any(shape <= words(other) for other in others)
                total += 1
    assert alike / total > 0.3


def test_two_hops_take_an_earlier_document() -> None:
    """The later document holds the answer and nothing of what the question names."""
    for world in worlds():
        for question in world.questions:
            if question.kind == "two_hop":
                first, second = question.support
                opening, sequel = world.documents[first], world.documents[second]
                assert names_in(question.text) <= names_in(opening)
                assert question.answer in words(sequel)
                assert not names_in(sequel) & names_in(opening)
                assert not names_in(question.text) & names_in(sequel)


def test_the_words_of_a_two_hop_question_do_not_say_which_document() -> None:
    """With two pairs or more, another question reads the same but for the name."""
    for world in worlds(sizes=(4, 6, MAX_DOCUMENTS)):
        asked = [q for q in world.questions if q.kind == "two_hop"]
        assert len(asked) >= 2
        answers = {q.answer for q in asked}
        assert len(answers) == len(asked)


def test_what_is_not_named_is_the_latest_thing_of_its_kind() -> None:
    """Read as a person reads: order alone says which opening a later document goes on about."""
    kind_of = {str(n): kind for kind in KINDS for n in all_names(kind, "eval")}
    seen = 0
    for world in worlds(count=60, sizes=(4, 6)):
        for question in world.questions:
            for bridge in BRIDGES:
                asked = [re.escape(d).replace(r"\{s\}", r"[A-Z]\w+") for d in bridge.descriptions]
                if question.kind == "two_hop" and re.search("|".join(asked), question.text):
                    first, second = question.support
                    between = re.findall(r"\w+", " ".join(world.documents[first:second]))
                    (meant,) = {n for n in between if kind_of.get(n) == bridge.value}
                    assert meant in world.documents[first]
                    seen += 1
    assert seen > 300


def test_given_puts_pairs_together() -> None:
    for seed in range(60):
        world = draw_world(seed, "eval", WorldOptions(order="given"))
        for question in world.questions:
            if question.kind == "two_hop":
                first, second = question.support
                assert second == first + 1


def test_shuffled_also_separates_pairs() -> None:
    gaps = Counter(
        question.support[1] - question.support[0]
        for seed in range(60)
        for question in draw_world(seed, "eval", WorldOptions()).questions
        if question.kind == "two_hop"
    )
    assert gaps[1] > gaps[2] > 0


def test_comparisons_name_the_older() -> None:
    seen = 0
    for world in worlds(count=80, sizes=(6,)):
        for question in world.questions:
            if question.kind != "comparison":
                continue
            years = {}
            for place in question.support:
                text = world.documents[place]
                (name,) = names_in(question.text) & names_in(text)
                (years[name],) = (int(y) for y in re.findall(r"\b19\d\d\b", text))
            assert question.answer == min(years, key=years.__getitem__)
            in_order = sorted(years, key=question.text.index)
            assert len(set(years.values())) == 2
            assert question.reason == ", ".join(f"{name} {years[name]}" for name in in_order)
            seen += 1
    assert seen > 20


def test_what_is_not_stated_is_not_told_in_any_wording() -> None:
    """Facts that an answer could come from are looked for in the text, not in the generator."""
    patterns = [
        (question, sentence)
        for relation in RELATIONS
        for question in relation.questions
        for sentence in relation.sentences
    ]
    seen = 0
    for world in worlds(count=20, sizes=(4, 6)):
        text = " ".join(world.documents)
        for question in world.questions:
            if question.kind != "not_stated":
                continue
            assert (question.answer, question.support) == (NOT_STATED, ())
            seen += 1
            for asked, told in patterns:
                found = re.fullmatch(re.escape(asked).replace(r"\{s\}", r"(\w+)"), question.text)
                if found:
                    sentence = re.escape(told).replace(r"\{s\}", found[1])
                    assert not re.search(sentence.replace(r"\{v\}", r"\w+"), text)
    assert seen > 300


def test_plain_style_has_one_wording_and_one_sentence() -> None:
    plain = Style(wordings=1, second_sentence=0.0)
    for world in worlds(style=plain, num_pairs=0, sizes=(6,)):
        assert all(document.count(".") == 1 for document in world.documents)
        assert not any(q.kind == "two_hop" for q in world.questions)


def told_by(document: str) -> set[str]:
    """The names of the relations whose first wording the document is."""
    patterns = {r.name: re.escape(r.sentences[0]) for r in RELATIONS}
    return {
        name
        for name, pattern in patterns.items()
        if re.fullmatch(re.sub(r"\\\{[sv]\\\}", r"\\w+", pattern), document)
    }


@pytest.mark.parametrize("num_sentences", [2, 4, 8])
def test_longer_documents_tell_and_ask_the_same(num_sentences) -> None:
    """The documents' own sentences stay together, in their place, and no question asks about
    others; so a document of one length is found again in a longer one."""
    for seed, order, split in product(range(30), ORDERS, ("train", "eval")):
        plain = draw_world(seed, split, WorldOptions(order=order))
        longer = draw_world(seed, split, WorldOptions(order=order, num_sentences=num_sentences))
        assert longer.questions == plain.questions
        for short, long in zip(plain.documents, longer.documents, strict=True):
            assert short in long
            assert long.count(".") == max(num_sentences, short.count("."))
        again = draw_world(seed, split, WorldOptions(order=order, num_sentences=num_sentences))
        assert again == longer


def test_what_is_beside_the_point_is_of_names_of_its_own() -> None:
    """Nothing there is named anywhere else, or could be what a document goes on about."""
    kind_of = {str(n): kind for kind in KINDS for n in all_names(kind, "eval")}
    places = set()
    for seed in range(60):
        plain, longer = (draw_world(seed, "eval", WorldOptions(num_sentences=n)) for n in (1, 8))
        beside = []
        for short, long in zip(plain.documents, longer.documents, strict=True):
            before, _, after = long.partition(short)
            places.add((before != "", after != ""))
            beside += re.findall(r"\w+", before + after)
        named = [word for word in beside if word in EVERY_NAME]
        drawn = [n for text in plain.documents for n in names_in(text)]
        asked = [n for question in plain.questions for n in names_in(question.text)]
        begun = Counter(name[:3] for name in set(named))
        assert len(begun) == len(set(named)) == len(named)
        assert not set(begun) & {name[:3] for name in drawn + asked}
        meant = {kind_of[q.reason] for q in plain.questions if q.kind == "two_hop"}
        assert not meant & {kind_of[name] for name in named}
    assert places == {(True, True), (True, False), (False, True)}


@pytest.mark.parametrize("size", [1, 6, MAX_DOCUMENTS])
def test_there_are_names_enough_for_the_longest_documents(size) -> None:
    most = max_sentences(size)
    for world in worlds(count=60, sizes=(size,), num_sentences=most):
        assert all(document.count(".") == most for document in world.documents)


@pytest.mark.parametrize("count", [1, 2])
def test_documents_tell_as_few_relations_as_wanted(count) -> None:
    plain = Style(wordings=1, second_sentence=0.0)
    seen = set()
    for world in worlds(style=plain, num_pairs=0, num_relations=count, sizes=(8,)):
        told = {name for document in world.documents for name in told_by(document)}
        assert 1 <= len(told) <= count
        seen |= told
    assert len(seen) > 5


def test_pairs_are_all_alike_where_that_is_wanted() -> None:
    for seed in range(50):
        options = WorldOptions(
            num_documents=8, num_pairs=4, has_pairs_alike=True, style=Style(wordings=1)
        )
        two = [q.text for q in draw_world(seed, "train", options).questions if q.kind == "two_hop"]
        assert len(two) == 4
        assert len({re.sub(r"[A-Z]\w+(?=[ ?])", "X", text[1:]) for text in two}) == 1


def test_subjects_come_first_unless_wanted_otherwise() -> None:
    """In "Gormund founded Fenlux" a name is told before it is known what of."""
    first_words = {False: set(), True: set()}
    for value_first, seen in first_words.items():
        for world in worlds(style=Style(value_first=value_first), sizes=(6,)):
            for question in world.questions:
                if question.kind == "one_hop" and question.text.startswith("Who founded "):
                    subject = question.text.removeprefix("Who founded ").removesuffix("?")
                    text = world.documents[question.support[0]]
                    if subject in text and question.answer in text:
                        seen.add(text.index(subject) < text.index(question.answer))
    assert first_words == {False: {True}, True: {True, False}}


def test_every_bridge_can_be_continued_in_all_wordings() -> None:
    for bridge in BRIDGES:
        assert continuations(bridge)
        for relation in continuations(bridge):
            leading = [s for s in relation.sentences if s.removeprefix("The ").startswith("{s}")]
            assert leading
            sequel = StoryWriter(Random(1), "train", VARIED).pair(bridge, relation).sequel
            assert sequel.refers_to is not None
            assert str(sequel.refers_to) not in sequel.text


@pytest.mark.parametrize(
    "options",
    [
        {"num_documents": 0},
        {"num_documents": MAX_DOCUMENTS + 1},
        {"num_documents": 3, "num_pairs": 2},
        {"num_pairs": -1},
        {"num_relations": 0},
        {"num_sentences": 0},
        {"num_documents": 6, "num_sentences": 9},
    ],
)
def test_impossible_worlds_are_refused(options) -> None:
    with pytest.raises(ValueError, match="must be"):
        WorldOptions(**options)
