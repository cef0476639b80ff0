"""The index against a search through all that was written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_text_index import SlowIndex

from duetto.runner.proposers.text_index import TextIndex, Writer, search_orders


def propose(index, text, most, min_share=0.0):
    match = index.find(text)
    return None if match is None else (match.length, index.follow(match, most, min_share))


pieces = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=12)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(
    pieces,
    st.integers(1, 3),
    st.integers(0, 9),
    st.sampled_from([5, 17, 64, 1000]),
    st.sampled_from([0.0, 0.3, 0.7]),
)
def test_finds_what_a_search_through_everything_finds(pieces, least, more, capacity, share):
    """Three texts that grow side by side, over four tokens, so that nearly all stood before."""
    index = TextIndex(least, least + more, capacity)
    slow = SlowIndex(least, least + more, capacity)
    writers = [Writer() for _ in range(3)]
    texts = [[] for _ in range(3)]
    for which, token_ids in pieces:
        index.append(writers[which], token_ids)
        slow.append(which, token_ids)
        texts[which] += token_ids
        assert propose(index, texts[which], 6, share) == slow.propose(texts[which], 6, share)
    assert index.num_kept <= capacity


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 40]))
def test_long_texts_with_many_matches(seed, vocabulary):
    """More matches than are counted, and more nodes than the first hash tables have places."""
    numbers = [(seed * (i + 1) * 2654435761 >> 16) % 97 % vocabulary for i in range(400)]
    index, slow = TextIndex(2, 8, 300), SlowIndex(2, 8, 300)
    writer = Writer()
    for start in range(0, 400, 50):
        index.append(writer, numbers[start : start + 50])
        slow.append(0, numbers[start : start + 50])
        assert propose(index, numbers[: start + 50], 8) == slow.propose(numbers[: start + 50], 8)


def test_a_floor_that_is_raised_forgets_what_is_before():
    index, slow = TextIndex(1, 4, 100), SlowIndex(1, 4, 100)
    writer = Writer()
    index.append(writer, [1, 2, 3, 1, 2, 4])
    slow.append(0, [1, 2, 3, 1, 2, 4])
    assert propose(index, [1, 2], 3) == slow.propose([1, 2], 3) == (2, (4,))
    index.floor = slow.floor = 4
    assert propose(index, [1, 2], 3) == slow.propose([1, 2], 3) == (1, (4,))
    index.floor = slow.floor = 6
    assert propose(index, [1, 2], 3) is slow.propose([1, 2], 3) is None


@pytest.mark.parametrize(
    ("bounds", "orders"),
    [((1, 1), (1,)), ((2, 8), (8, 4, 2)), ((2, 5), (4, 2)), ((3, 64), (6, 3)), ((9, 20), (9,))],
)
def test_orders(bounds, orders):
    assert search_orders(*bounds) == orders
