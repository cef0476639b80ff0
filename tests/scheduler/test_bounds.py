"""What is remembered of clients and texts is bounded, and what is forgotten does no harm."""

import pytest
from fakes import make_request
from scheduler.scripted import SMALL

from duetto.core.cache_miss import MissReason
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.scheduler import drafted, fairness, misses
from duetto.scheduler.block_pool import BlockPool
from duetto.scheduler.drafted import DraftedRequests
from duetto.scheduler.fairness import Turns
from duetto.scheduler.misses import MissMemory, hashed_tokens
from duetto.scheduler.policy import one_level


def test_a_client_whose_last_turn_is_forgotten_has_had_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fairness, "MAX_REMEMBERED", 2)
    turns = Turns(one_level)
    made = [make_request(name, tenant=name.encode()) for name in "abc"]
    for request in (made[1], made[0], made[2], made[2]):  # the last turn of b is forgotten
        turns.take(request)
        turns.give_back(request)
    waiting = made[:]
    assert [request.request_id for request in turns.in_order(waiting)] == ["b", "a", "c"]
    assert len(turns._last_turn) == 2


def test_of_many_tenants_the_drafts_of_the_oldest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafted, "MAX_POOLS", 2)
    requests = DraftedRequests()
    first, second = requests.pool(b"a", "d"), requests.pool(b"b", "d")
    assert requests.pool(b"a", "d") is first  # used again: b is the oldest now
    requests.pool(b"c", "d")
    assert requests.pool(b"a", "d") is first
    assert requests.pool(b"b", "d") is not second


@pytest.mark.parametrize(
    ("num_later", "reason"), [(1, MissReason.OTHER_SALT), (2, MissReason.NEVER_SEEN)]
)
def test_a_text_published_long_ago_counts_as_never_seen(
    monkeypatch: pytest.MonkeyPatch, num_later: int, reason: MissReason
) -> None:
    monkeypatch.setattr(misses, "MAX_REMEMBERED", 2)
    config = SchedulerConfig(**SMALL)
    memory, pool = MissMemory(config), BlockPool(config.num_blocks)
    for number in range(1 + num_later):
        memory.learn(hashed_tokens(_of_one_block(number, b"")), 0)
    miss = memory.explain(_of_one_block(0, b"other"), 0, pool)
    assert miss is not None and miss.reason is reason


def _of_one_block(number: int, salt: bytes) -> Request:
    return make_request(prompt=(number,) * 5, cache_salt=salt)
