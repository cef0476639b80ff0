"""What is said of a request's segments, in JSON and in words."""

import pytest

from duetto.core.cache_miss import MissReason, SegmentHit
from duetto.server.observe.reused import segment_lines, segments_found


def test_what_was_found_and_what_was_missed() -> None:
    hits = (SegmentHit(4, 260, 256), SegmentHit(260, 516, 0, MissReason.EVICTED))
    missed = {"reason": "evicted", "token": 0, "differs_at": None}
    assert segments_found(hits, tells_other_salts=False) == [
        {"start": 4, "end": 260, "found_tokens": 256, "miss": None},
        {"start": 260, "end": 516, "found_tokens": 0, "miss": missed},
    ]
    assert len(segment_lines(hits, tells_other_salts=False)) == 2


@pytest.mark.parametrize(
    ("hit", "words"),
    [
        (SegmentHit(4, 260, 256), "tokens 4 to 259: their own KV was there"),
        (
            SegmentHit(4, 260, 0, MissReason.NEVER_SEEN),
            "tokens 4 to 259: all were computed alone: nothing remembered begins like it",
        ),
        (
            SegmentHit(4, 260, 64, MissReason.DIFFERS, 70),
            "tokens 4 to 259: 64 of 256 were there; the others were computed alone: another text "
            "that begins alike has another token 70",
        ),
        (
            SegmentHit(4, 260, 0, MissReason.EVICTED),
            "tokens 4 to 259: all were computed alone: it was there, and its blocks were taken for "
            "other requests",
        ),
        (
            SegmentHit(0, 256, 0, MissReason.AT_START),
            "tokens 0 to 255: the prompt begins with it, so what the prefix cache has of it is "
            "exact",
        ),
        (
            SegmentHit(4, 12, 0, MissReason.ALL_COMPUTED),
            "tokens 4 to 11: too short: the choice leaves nothing of it to reuse",
        ),
    ],
)
def test_each_segment_has_a_line(hit: SegmentHit, words: str) -> None:
    assert segment_lines((hit,), tells_other_salts=False) == [words]


def test_that_others_have_it_is_told_only_where_there_are_none() -> None:
    hits = (SegmentHit(4, 260, 0, MissReason.OTHER_SALT),)
    assert "another tenant" in segment_lines(hits, tells_other_salts=True)[0]
    hidden = segment_lines(hits, tells_other_salts=False)[0]
    assert hidden.endswith("nothing remembered begins like it")
    assert "other_salt" not in str(segments_found(hits, tells_other_salts=False))
