"""Segments are tokenized alone, and joined: what a tokenizer adds stands once, outside of them."""

import pytest
from tiny_tokenizers import ALL_KINDS

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.core.errors import InvalidRequest
from duetto.core.reuse import TokenRange
from duetto.engine.segments import PromptSegment, encode_segments, read_segments

TEXTS = ("The dog and", " the fox", "</s>the dog", "the")


@pytest.fixture(scope="module", params=ALL_KINDS)
def codec(request) -> Tokenizer:
    return Tokenizer(ALL_KINDS[request.param]())


def alone(codec: Tokenizer, text: str) -> list[int]:
    return codec.encode(text, add_special_tokens=False)


def test_a_text_is_what_it_is_alone_and_what_is_added(codec):
    for text in (*TEXTS, "<s>the</s>"):
        before, ids, after = codec.encode_apart(text)
        assert ids == alone(codec, text)
        assert [*before, *ids, *after] == codec.encode(text)


def test_one_segment_is_an_ordinary_prompt(codec):
    for add in (True, False):
        found = encode_segments(codec, [PromptSegment(TEXTS[0])], add_special_tokens=add)
        assert [*found.token_ids] == codec.encode(TEXTS[0], add_special_tokens=add)
        assert found.reusable == ()


def test_every_segment_has_the_ids_that_it_has_alone(codec):
    segments = [PromptSegment(text, i % 2 == 1) for i, text in enumerate(TEXTS)]
    found = encode_segments(codec, segments)
    before, _, _ = codec.encode_apart(TEXTS[0])
    _, _, after = codec.encode_apart(TEXTS[-1])
    joined = [i for text in TEXTS for i in alone(codec, text)]
    assert [*found.token_ids] == [*before, *joined, *after]
    marked = [[*found.token_ids[start:end]] for start, end in found.reusable]
    assert marked == [alone(codec, TEXTS[1]), alone(codec, TEXTS[3])]


def test_a_first_segment_that_is_marked_begins_behind_what_is_added(codec):
    found = encode_segments(codec, [PromptSegment(TEXTS[0], True), PromptSegment(TEXTS[1])])
    before, ids, _ = codec.encode_apart(TEXTS[0])
    assert found.reusable == (TokenRange(len(before), len(before) + len(ids)),)


def test_ids_are_taken_as_they_are(codec):
    ids = [5, 6, 7]
    found = encode_segments(codec, [PromptSegment(ids), PromptSegment(ids, is_reusable=True)])
    assert found == ((5, 6, 7, 5, 6, 7), (TokenRange(3, 6),))


def test_an_empty_segment_is_nothing(codec):
    segments = [PromptSegment("", True), PromptSegment((), True), PromptSegment("the", True)]
    found = encode_segments(codec, segments, add_special_tokens=False)
    ids = alone(codec, "the")
    assert found == (tuple(ids), (TokenRange(0, len(ids)),))


def test_what_callers_write():
    given = ["a", [1, 2], {"text": "b"}, {"token_ids": (3,), "reusable": True}]
    assert read_segments(given) == [
        PromptSegment("a"),
        PromptSegment([1, 2]),
        PromptSegment("b"),
        PromptSegment((3,), is_reusable=True),
    ]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("ab", "segments"),
        ({"text": "a"}, "segments"),
        (5, "segments"),
        (["a", 5], "segments[1]"),
        (["a", None], "segments[1]"),
        ([["a"]], "segments[0]"),
        ([[True]], "segments[0]"),
        ([{"text": "a", "token_ids": [1]}], "segments[0]"),
        ([{"reusable": True}], "segments[0]"),
        ([{"text": "a", "reusable": "yes"}], "segments[0].reusable"),
        ([{"text": "a", "cache": "reusable"}], "segments[0]"),
        ([{"text": 5}], "segments[0]"),
    ],
    ids=str,
)
def test_what_is_no_segment_is_named(given, field):
    with pytest.raises(InvalidRequest) as refusal:
        read_segments(given)
    assert refusal.value.field == field
