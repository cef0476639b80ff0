"""How reuse is asked for: one form for all doors, and words that name what is wrong in it."""

import pytest

from duetto.core.errors import InvalidRequest
from duetto.core.reuse import METHODS, Reuse, TokenRange
from duetto.core.reuse_choice import (
    MAX_SEGMENTS,
    NUMBERS,
    ReuseChoice,
    ReuseLimits,
    ReuseRules,
    insisted,
    parse_reuse,
    word_of,
)

SEGMENTS = (TokenRange(2, 9), TokenRange(12, 40))
FIRST = ReuseChoice("first", (("num_first", 16),))


def test_every_method_has_its_numbers() -> None:
    assert set(METHODS) <= set(NUMBERS)
    for method in METHODS:
        assert set(NUMBERS[method]) <= set(Reuse.__dataclass_fields__)


def test_a_word_and_an_object_are_the_same() -> None:
    assert parse_reuse("first:16") == parse_reuse({"method": "first", "num_first": 16}) == FIRST
    assert parse_reuse("none") == parse_reuse({"method": "none"}) == ReuseChoice("none")
    assert parse_reuse("off") is parse_reuse(False) is None
    asked = parse_reuse({"method": "none", "on_unsupported": "compute"})
    assert asked == ReuseChoice("none", on_unsupported="compute")


def test_a_word_is_read_again() -> None:
    words = (
        "none",
        "first:16",
        "first:0",
        "first:12345678",
        "hkvd:0.15",
        "query:1",
        "query:0.15:2",
    )
    for word in words:
        choice = parse_reuse(word)
        assert choice is not None and str(choice) == word == word_of(choice.over(SEGMENTS))


def test_a_choice_is_made_for_segments() -> None:
    assert FIRST.over(SEGMENTS) == Reuse(SEGMENTS, "first", 16)
    assert FIRST.amount == 16 and ReuseChoice("none").amount is None


def test_all_of_it_is_lossless() -> None:
    assert FIRST.is_lossy and ReuseChoice("none").is_lossy
    # What has a ratio is a full prefill at 1.
    assert not ReuseChoice("query", (("ratio", 1.0),)).is_lossy
    assert ReuseChoice("hkvd", (("ratio", 0.99),)).is_lossy


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (True, "reuse"),
        (5, "reuse"),
        ("", "reuse.method"),
        ("best", "reuse.method"),
        ("best:0.1", "reuse.method"),
        ("first", "reuse.num_first"),
        ("first:x", "reuse.num_first"),
        ("first:-1", "reuse.num_first"),
        ("first:1.5", "reuse.num_first"),
        ("first:1:2", "reuse"),
        ("none:1", "reuse"),
        ({}, "reuse.method"),
        ({"method": None}, "reuse.method"),
        ({"method": ["first"]}, "reuse.method"),
        ({"method": "first", "num_first": True}, "reuse.num_first"),
        ({"method": "first", "num_first": 2**40}, "reuse.num_first"),
        ("query:nan", "reuse.ratio"),
        ("hkvd:inf", "reuse.ratio"),
        ("hkvd:-0.1", "reuse.ratio"),
        ({"method": "first", "num_first": 4, "ratio": 0.1}, "reuse.ratio"),
        ({"method": "none", "nun_first": 4}, "reuse.nun_first"),
        ({"method": "none", "on_unsupported": "ignore"}, "reuse.on_unsupported"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(given, field) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_reuse(given)
    assert refusal.value.field == field


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan"), float("inf"), True, "0.1", [0.1]])
def test_a_ratio_is_from_0_to_1(ratio) -> None:
    with pytest.raises(InvalidRequest, match="from 0 to 1") as refusal:
        parse_reuse({"method": "query", "ratio": ratio})
    assert refusal.value.field == "reuse.ratio"


@pytest.mark.parametrize("name", ["ratio", "num_rounds", "method", "on_unsupported"])
def test_a_number_that_python_does_not_write_is_refused_like_others(name: str) -> None:
    given = {"method": "query", "ratio": 0.5, name: 10**5000}
    with pytest.raises(InvalidRequest, match="a number of more than 64 bits") as refusal:
        parse_reuse(given)
    assert refusal.value.field == f"reuse.{name}"


def test_ratio_and_rounds() -> None:
    assert parse_reuse("query:0.15:2") == ReuseChoice("query", (("ratio", 0.15), ("num_rounds", 2)))
    for word in ("query:0.15", "query:1", "query:0.123456789:2"):
        assert str(parse_reuse(word)) == word
    for word in ("query", "query:x", "query:2", "query:0.1:0", "query:0.1:1.5", "query:0.1:1:1"):
        with pytest.raises(InvalidRequest):
            parse_reuse(word)
    with pytest.raises(InvalidRequest, match="needs it"):
        parse_reuse({"method": "query", "num_rounds": 2})


def test_the_servers_choice_is_for_who_has_none() -> None:
    rules = ReuseRules(default=FIRST)
    assert rules.chosen(None) == FIRST
    assert rules.chosen("none") == ReuseChoice("none")
    assert rules.chosen(False) is None
    assert ReuseRules().chosen(None) is None


def test_a_lossy_choice_is_refused_unless_somebody_vouches_for_it() -> None:
    refusal = ReuseRules().asked(FIRST, SEGMENTS).refusal
    assert refusal is not None and refusal.field == "reuse"
    assert "first:16 changes answers" in refusal.message
    assert ReuseRules().asked(FIRST, ()).refusal is None  # there is nothing to reuse
    assert ReuseRules(why_not=insisted).asked(FIRST, SEGMENTS).refusal is None
    known = InvalidRequest("messages[0]", "has no place")
    assert ReuseRules(why_not=insisted).asked(FIRST, SEGMENTS, known).refusal is known


def test_there_may_be_so_many_segments() -> None:
    rules = ReuseRules(why_not=insisted)
    many = tuple(TokenRange(2 * i, 2 * i + 1) for i in range(MAX_SEGMENTS + 1))
    assert rules.asked(FIRST, many[1:]).refusal is None
    assert "at most 256" in str(rules.asked(FIRST, many).refusal)


def test_what_cannot_be_moved_is_refused() -> None:
    def refusal(limits: ReuseLimits) -> str:
        found = ReuseRules(why_not=insisted, limits=limits).asked(FIRST, SEGMENTS).refusal
        return "" if found is None else str(found)

    assert refusal(ReuseLimits()) == refusal(ReuseLimits(window=28)) == ""
    assert "not moved: a segment of 28 tokens" in refusal(ReuseLimits(window=27))
    assert refusal(ReuseLimits("no rotation")) == "reuse: not moved: no rotation"


def test_a_look_that_the_model_has_no_layer_for_is_refused() -> None:
    limits = ReuseLimits(no_deviation="one layer")
    rules = ReuseRules(why_not=insisted, limits=limits)
    refused = rules.asked(ReuseChoice("hkvd", (("ratio", 0.5),)), SEGMENTS).refusal
    assert str(refused) == "reuse: method hkvd cannot choose: one layer"
    for word in ("none", "first:16", "query:0.5", "hkvd:0", "hkvd:1"):  # which look at nothing
        choice = parse_reuse(word)
        assert choice is not None and rules.asked(choice, SEGMENTS).refusal is None


def test_what_no_measurement_can_help_is_not_sent_to_be_measured() -> None:
    refusal = ReuseRules(limits=ReuseLimits("no rotation")).asked(FIRST, SEGMENTS).refusal
    assert str(refusal) == "reuse: not moved: no rotation"
