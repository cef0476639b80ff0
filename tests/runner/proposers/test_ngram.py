"""Drafts from a request's own tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duetto.core.speculation import NgramOptions
from duetto.runner.proposers import ngram
from duetto.runner.proposers.histories import Histories
from duetto.runner.proposers.ngram import NgramProposer
from duetto.runner.proposers.proposer import DraftRequest


def proposer(**options):
    return NgramProposer(NgramOptions(**options), max_requests=4)


def ask(proposer, token_ids, *, start=0, wanted=4, request_id="r"):
    (drafts,) = proposer.propose([DraftRequest(request_id, wanted, start, tuple(token_ids))])
    return drafts


@pytest.mark.parametrize(
    ("text", "wanted", "drafts"),
    [
        ([1, 2, 3, 4, 2, 3], 3, (4, 2, 3)),  # vLLM's own example
        ([1, 2, 3, 4, 2, 3], 1, (4,)),
        ([1, 2, 3, 4, 2, 3], 0, ()),
        ([1, 2, 3, 4], 4, ()),  # nothing stood before
        ([1, 2, 9, 1, 2, 8, 1, 2], 1, (8,)),  # of equals, the last
        ([1, 2, 9, 1, 2, 9, 1, 2, 8, 1, 2], 1, (9,)),  # the most frequent
        ([5, 1, 2, 7, 1, 2, 8, 1, 2, 8, 5, 1, 2], 1, (7,)),  # the longest match, though rarer
        ([1, 1, 1, 1], 4, (1,)),
        ([], 4, ()),
    ],
)
def test_by_hand(text, wanted, drafts):
    assert ask(proposer(), text, wanted=wanted) == drafts


def test_bounds_of_the_match():
    text = [5, 1, 2, 7, 1, 2, 8, 1, 2, 8, 5, 1, 2]
    assert ask(proposer(prompt_lookup_max=2), text, wanted=1) == (8,)
    assert ask(proposer(prompt_lookup_min=4), text) == ()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.data())
def test_piece_by_piece_is_as_all_at_once(text, data):
    """Also where pieces overlap, or are sent again from the beginning."""
    grown, sent = proposer(), 0
    while sent < len(text):
        end = data.draw(st.integers(sent + 1, len(text)))
        start = data.draw(st.integers(0, sent))
        drafts = ask(grown, text[start:end], start=start)
        assert drafts == ask(proposer(), text[:end])
        sent = end


def test_tokens_that_change_are_taken_from_the_last_piece():
    grown = proposer()
    ask(grown, [1, 2, 3, 1, 2, 9, 9, 9])
    assert ask(grown, [1, 2], start=3) == ask(proposer(), [1, 2, 3, 1, 2])


def test_a_gap_costs_the_drafts_until_a_new_beginning():
    grown = proposer()
    ask(grown, [1, 2, 3])
    assert ask(grown, [1, 2, 3, 1, 2], start=5) == ()
    assert ask(grown, [3, 1, 2], start=10) == ()
    assert ask(grown, [1, 2, 3, 1, 2]) == (3, 1, 2)


def test_requests_do_not_mix():
    both = proposer()
    ask(both, [1, 2, 3, 9], request_id="a")
    assert ask(both, [1, 2], request_id="b") == ()


def test_a_long_prompt_is_indexed_over_several_calls(monkeypatch):
    monkeypatch.setattr(ngram, "_MAX_INDEXED", 5)
    slow = proposer()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert ask(slow, text) == ()
    assert ask(slow, [3], start=10) == ()  # 10 of 11
    assert ask(slow, [4], start=11) == (5, 6, 7, 8)


def test_what_is_remembered_is_bounded():
    histories = Histories(list, max_requests=3, max_tokens=10)

    def update(request_id, token_ids, start=0):
        return histories.update(DraftRequest(request_id, 0, start, tuple(token_ids)))

    for request_id in "abcd":
        update(request_id, [1, 2])
    assert len(histories) == 3 and histories.num_tokens == 6
    assert update("a", [3], start=2) is None  # asked least recently
    assert update("b", [3], start=2).token_ids == [1, 2, 3]
    update("d", [0] * 6, start=2)
    assert len(histories) == 1 and histories.num_tokens == 8  # b and c together are too much
    update("e", range(20))
    assert len(histories) == 1 and histories.num_tokens == 20  # one may be as long as it is
