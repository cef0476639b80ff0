"""What is counted of drafts adds up, however it is put together."""

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duetto.core.draft_counts import (
    GRAMMAR,
    NO_CHAINS,
    Chains,
    DraftCount,
    Speculation,
    StepDrafts,
    tokens_per_step,
)

CHAIN = st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@given(st.lists(CHAIN, max_size=20))
def test_places_are_counted_as_one_by_one(pairs) -> None:
    chains = reduce(Chains.plus, (Chains.of(*pair) for pair in pairs), NO_CHAINS)
    longest = max((n for n, _ in pairs), default=0)
    assert chains.num_chains == len(pairs)
    assert chains.proposed == tuple(sum(n > i for n, _ in pairs) for i in range(longest))
    assert chains.accepted == tuple(sum(a > i for _, a in pairs) for i in range(longest))
    assert chains.total == (sum(n for n, _ in pairs), sum(a for _, a in pairs))
    # No draft is accepted without those before it.
    assert list(chains.accepted) == sorted(chains.accepted, reverse=True)


@given(st.lists(st.tuples(CHAIN, st.sampled_from(["ngram", "suffix"])), max_size=20))
def test_methods_divide_all_drafts(chains) -> None:
    told = Speculation()
    for pair, method in chains:
        told.asked = method
        told.add_chain(Chains.of(*pair))
    assert told.total == (
        sum(count.num_proposed for count in told.by_method.values()),
        sum(count.num_accepted for count in told.by_method.values()),
    )
    assert set(told.by_method) == {method for _, method in chains}


def test_the_mean_length_has_the_bonus_token() -> None:
    chains = Chains.of(3, 2).plus(Chains.of(1, 0))
    assert chains == Chains(2, (2, 1, 1), (1, 1, 0))
    assert chains.mean_length == 2.0
    assert chains.total.acceptance == 0.5
    assert NO_CHAINS.mean_length is None and DraftCount().acceptance is None
    assert StepDrafts(chains).verified.total == (4, 2)


@pytest.mark.parametrize(
    ("num_tokens", "num_accepted", "expected"),
    [(10, 0, 1.0), (10, 5, 2.0), (0, 0, None), (1, 0, 1.0)],
)
def test_tokens_per_step(num_tokens, num_accepted, expected) -> None:
    assert tokens_per_step(num_tokens, num_accepted) == expected


def test_prices_add_up_and_are_none_until_there_is_one() -> None:
    told = Speculation()
    assert told.verifying_s is None and told.saved_s is None
    told.add_price(verifying=0.5, saved=-0.25)
    told.add_price(verifying=0.0, saved=1.0)
    assert (told.verifying_s, told.saved_s) == (0.5, 0.75)


def test_what_is_taken_back_was_not_accepted() -> None:
    told = Speculation(asked="ngram")
    told.add_chain(Chains.of(3, 3))
    told.asked = "suffix"
    told.add_chain(Chains.of(4, 3))
    told.asked = "ngram"  # for the next step, where there is none
    told.add_price(verifying=0.5, saved=3 * 0.25 - 0.5, gain=0.25)
    step = StepDrafts(told.last_chain.plus(Chains.of(1, 1)))
    assert step.taken_back(told.last_chain, 2).verified == Chains(2, (2, 1, 1, 1), (2, 0, 0, 0))
    told.take_back(2)
    assert told.chains == Chains(2, (2, 2, 2, 1), (2, 1, 1, 0))
    assert told.last_chain == Chains.of(4, 1)
    assert told.by_method == {"ngram": DraftCount(3, 3), "suffix": DraftCount(4, 1)}
    assert (told.verifying_s, told.saved_s) == (0.5, 0.25 - 0.5)


def test_what_a_grammar_made_follow_is_counted_apart():
    told, chain = Speculation(), Chains.of(4, 3)
    told.asked = "ngram"
    told.add_chain(Chains.of(2, 0))
    told.add_chain(chain, GRAMMAR)
    step = StepDrafts(verified=Chains.of(2, 1), of_grammars=chain)
    step = step.taken_back(told.last_chain, 2, of_grammar=told.last_method == GRAMMAR)
    told.take_back(2)
    assert told.by_method == {"ngram": DraftCount(2, 0), GRAMMAR: DraftCount(4, 1)}
    assert step.verified == Chains.of(2, 1) and step.of_grammars.total == DraftCount(4, 1)
