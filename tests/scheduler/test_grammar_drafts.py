"""The policy of drafts that a grammar makes follow: as many as pay, learned apart."""

import pytest
from fakes import make_request

from duetto.core.shape import BatchShape, RequestShape
from duetto.scheduler.drafts import Candidate, DraftOutcome
from duetto.scheduler.grammar_drafts import GrammarDrafts

ONE = BatchShape((RequestShape(1, 50),))
DRAFTS = tuple(range(10, 18))


def priced(row_s: float):
    """A step of one row takes a second, and each row more `row_s`."""
    return lambda shape, more: [1.0 + (shape.num_tokens - 1 + n) * row_s for n in range(more + 1)]


def taught(policy: GrammarDrafts, request, tokens: tuple[int, ...], times: int = 40) -> None:
    for _ in range(times):
        policy.choose([Candidate(request, DRAFTS)], ONE, 64)
        policy.learn([DraftOutcome(request, len(DRAFTS), tokens)], 0.0)


@pytest.fixture
def request_():
    return make_request("r", [1, 2, 3], 100)


def chosen(policy: GrammarDrafts, request, **options) -> int:
    asked = {"shape": ONE, "room": 64} | options
    return policy.choose([Candidate(request, DRAFTS)], **asked).get("r", 0)


def test_those_that_are_always_right_are_all_verified(request_):
    policy = GrammarDrafts(priced(0.3))
    taught(policy, request_, (*DRAFTS, 99))
    assert chosen(policy, request_) == len(DRAFTS)
    assert chosen(policy, request_, room=3) == 3
    assert chosen(policy, request_, limit_s=1.7) == 2


def test_those_that_are_wrong_are_let_be_and_learned_of_all_the_same(request_):
    policy = GrammarDrafts(priced(0.3))
    taught(policy, request_, (99,))
    assert chosen(policy, request_) == 0
    taught(policy, request_, (*DRAFTS, 99))
    assert chosen(policy, request_) == len(DRAFTS)


def test_a_row_that_takes_as_long_as_a_step_is_not_worth_it(request_):
    policy = GrammarDrafts(priced(1.0))
    taught(policy, request_, (*DRAFTS, 99))
    assert chosen(policy, request_) == 0


def test_a_mask_that_takes_as_long_as_a_step_is_not_worth_it(request_):
    policy = GrammarDrafts(priced(0.01))
    taught(policy, request_, (*DRAFTS, 99))
    assert chosen(policy, request_) == len(DRAFTS)
    for _ in range(100):
        policy.learn([], 1.0)
    assert chosen(policy, request_) == 0


def test_a_chunk_beside_it_makes_no_draft_cheap(request_):
    policy = GrammarDrafts(priced(0.9))
    taught(policy, request_, (*DRAFTS[:2], 99))
    beside = BatchShape((RequestShape(1, 50), RequestShape(100, 0, 0)))
    assert chosen(policy, request_, shape=beside) <= chosen(policy, request_)


def test_before_any_price_is_known_nothing_is_tried(request_):
    policy = GrammarDrafts(lambda shape, more: [0.0] * (more + 1))
    assert chosen(policy, request_) == 0


def test_nothing_is_kept_of_a_request_that_has_ended(request_):
    policy = GrammarDrafts(priced(0.1))
    taught(policy, request_, (*DRAFTS, 99), times=1)
    policy.forget(request_)
    assert not len(policy._requests)
