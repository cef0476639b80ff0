"""What is expected of drafts."""

import random

import pytest

from duetto.core.speculation import MAX_DRAFTS
from duetto.scheduler.acceptance import Acceptance, Pool


def shown(acceptance: Acceptance, chances: list[float], times: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(times):
        drafts = [1 if rng.random() < chance else 2 for chance in chances]
        acceptance.observe(drafts, [1] * len(drafts))


def test_before_anything_is_known_each_draft_is_right_half_of_the_time() -> None:
    assert Acceptance(Pool()).survivals()[:3] == pytest.approx([0.5, 0.25, 0.125])


def test_positions_are_told_apart() -> None:
    acceptance = Acceptance(Pool())
    shown(acceptance, [0.3, 0.95, 0.95, 0.95], 2000)
    first, second, *_ = acceptance.survivals()
    assert first == pytest.approx(0.3, abs=0.15) and second / first > 0.8


def test_a_new_request_begins_with_what_its_tenant_showed() -> None:
    pool = Pool()
    shown(Acceptance(pool), [0.9] * 4, 300)
    assert Acceptance(pool).survivals()[0] == pytest.approx(0.9, abs=0.05)
    assert Acceptance(Pool()).survivals()[0] == pytest.approx(0.5)


def test_what_is_always_wrong_is_not_thought_of_for_long() -> None:
    acceptance = Acceptance(Pool())
    shown(acceptance, [0.0], 60)
    assert acceptance.survivals() == []


def test_a_request_that_becomes_better_is_seen() -> None:
    acceptance = Acceptance(Pool())
    shown(acceptance, [0.05], 100)
    shown(acceptance, [0.95], 40)
    assert acceptance.survivals()[0] > 0.5


def test_only_what_was_reached_is_observed() -> None:
    acceptance = Acceptance(Pool())
    assert acceptance.observe([1, 1, 1], [1, 5]) == 1  # the second was wrong; the third unknown
    assert acceptance.pool.num_seen == 2
    assert acceptance.observe([1, 1, 1], [1]) == 1  # not verified, but it is what was sampled
    assert acceptance.pool.num_seen == 3


def test_survivals_never_grow_and_are_few() -> None:
    acceptance = Acceptance(Pool())
    shown(acceptance, [0.99] * (MAX_DRAFTS + 3), 100)
    assert len(acceptance.survivals()) == MAX_DRAFTS
    assert acceptance.survivals() == sorted(acceptance.survivals(), reverse=True)


def test_one_unlucky_position_is_not_believed_alone() -> None:
    pool = Pool()
    acceptance = Acceptance(pool)
    for _ in range(40):
        acceptance.observe([1, 1, 1, 1], [1, 1, 1, 1])
    for _ in range(6):
        acceptance.observe([1, 1, 1, 1, 2], [1, 1, 1, 1, 1])
    assert pool.estimates[4] > 0.4  # itself it has shown none in six
    for _ in range(100):
        acceptance.observe([1, 1, 1, 1, 2], [1, 1, 1, 1, 1])
    assert pool.estimates[4] < 0.2


def test_as_many_as_are_asked_for_are_told() -> None:
    acceptance = Acceptance(Pool())
    shown(acceptance, [0.9] * 4, 100)
    few, all_of_them = acceptance.survivals(2), acceptance.survivals()
    assert len(few) == 2 and list(few) == all_of_them[:2] == acceptance.survivals(2)
