"""What a pool tells of its published blocks is what it has published, whatever happens."""

from random import Random
from typing import Any

import pytest
from fakes import ShadowExecutor, make_request
from scheduler.event_judge import JudgedLog
from scheduler.pin_world import text_of
from scheduler.tier_walk import PinnedTierWorld
from scheduler.tier_walk import _episode as tier_episode
from scheduler.walk import _episode, random_driver

from duetto.core.cache_control import Drop
from duetto.core.config import SchedulerConfig
from duetto.engine.engine import Engine
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEventLog
from duetto.scheduler.scheduler import Scheduler

ALL = (BlocksStored, BlocksRemoved, BlocksCleared)


def small_world(**options: Any) -> tuple[Engine, list[Any]]:
    config = SchedulerConfig(num_blocks=6, max_model_len=16, block_size=2, **options)
    scheduler = Scheduler(config)
    heard: list[Any] = []
    scheduler.pool.events = KVEventLog(config.block_size, heard.extend)
    return Engine(scheduler, ShadowExecutor(6, 2)), heard


def run(engine: Engine, request_id: str, prompt: list[int], **options: Any) -> Any:
    request = make_request(request_id, prompt, 1, **options)
    engine.add(request)
    while engine.has_work:
        engine.step()
    return request


def test_a_run_says_what_it_follows_and_what_its_tokens_are():
    engine, heard = small_world()
    first = run(engine, "a", [1, 2, 1, 1, 2])
    assert heard == [BlocksStored(tuple(first.block_hashes[:2]), None, (1, 2, 1, 1), 2, False)]
    heard.clear()
    second = run(engine, "b", [1, 2, 1, 1, 2, 2, 1], cache_salt=b"")
    parent = first.block_hashes[1]
    assert heard == [BlocksStored((second.block_hashes[2],), parent, (2, 2), 2, False)]


def test_what_is_salted_says_so_and_does_not_say_with_what():
    engine, heard = small_world()
    request = run(engine, "a", [1, 2, 1], cache_salt=b"secret")
    assert heard == [BlocksStored(tuple(request.block_hashes[:1]), None, (1, 2), 2, True)]


def test_what_another_takes_is_removed_before_it_stores():
    engine, heard = small_world()
    old = run(engine, "a", [1] * 9)
    heard.clear()
    new = run(engine, "b", [2] * 9)
    assert [type(event) for event in heard] == [BlocksRemoved, BlocksStored]
    assert set(heard[0].hashes) < set(old.block_hashes)
    assert heard[1].hashes == tuple(new.block_hashes[:4])


def test_what_a_user_drops_is_told_without_a_step():
    engine, heard = small_world()
    request = run(engine, "a", [1] * 5)
    heard.clear()
    text = text_of(request.token_ids[:4], engine.scheduler.config, b"", is_segment=False)
    engine.control(Drop(b"", text))
    assert heard == [BlocksRemoved(tuple(request.block_hashes[1::-1]))]  # the last one first


def test_what_another_engine_computed_is_told():
    engine, heard = small_world()
    request = make_request("a", [1, 2, 1, 2, 1], 1)
    imports = engine.scheduler.imports
    taken = imports.take(request)
    assert taken is not None
    imports.publish(taken)
    engine.add(request)
    while engine.has_work:
        engine.step()
    assert heard == [BlocksStored(taken.hashes, None, (1, 2, 1, 2), 2, False)]


def test_what_waits_when_all_is_cleared_is_not_told():
    heard: list[Any] = []
    log = KVEventLog(1, heard.extend)
    log.stored([5], [b"a"], [0], is_salted=False)
    log.removed(b"a")
    log.cleared()
    log.stored([6, 7, 8], [b"b", b"c", b"d"], [0, 2], is_salted=False)
    log.removed(b"unknown")
    assert heard == []
    log.hand_on()
    assert heard == [
        BlocksCleared(),
        BlocksStored((b"b",), None, (6,), 1, False),
        BlocksStored((b"d",), b"c", (8,), 1, False),
    ]
    log.hand_on()
    assert len(heard) == 3
    assert log.published() == (b"b", b"d")


@pytest.mark.parametrize("seed", range(6))
def test_the_index_is_the_pools_after_every_step(seed):
    """With texts that are reused, drafts, steps in flight, preemptions, failures and resets."""
    rng, max_waiting = Random(seed), 4 if seed % 3 == 0 else 8192
    logs = [_walked(rng, max_waiting) for _ in range(3)]
    assert sum(log.num_judged for log in logs) > 60
    assert all(log.most_at_once < max_waiting + 24 for log in logs), "it is not bounded"


def _walked(rng: Random, max_waiting: int) -> JudgedLog:
    driver = random_driver(rng, Scheduler)
    log = JudgedLog(driver.scheduler, max_waiting)
    _episode(driver, rng)
    return log


def test_a_walk_comes_to_all_that_may_happen():
    log = [_walked(Random(seed), 8192) for seed in range(6)]
    for kind in ALL:
        assert sum(each.num[kind] for each in log) > 2, kind


@pytest.mark.parametrize("seed", range(3))
def test_with_tiers_pins_and_drops_too(seed, monkeypatch):
    """What comes back from a tier is stored again; what a user drops is told without a step."""
    logs: list[JudgedLog] = []

    def init(world: PinnedTierWorld, *args: Any, **options: Any) -> None:
        plain(world, *args, **options)
        logs.append(JudgedLog(world.scheduler))

    plain = PinnedTierWorld.__init__
    monkeypatch.setattr(PinnedTierWorld, "__init__", init)
    seen = [tier_episode(Random(seed * 10 + number)) for number in range(3)]
    assert len(logs) == 3
    assert sum(log.num_judged for log in logs) > 60
    assert sum(each.num_loaded for each in seen) > 0
    assert sum(log.num[BlocksRemoved] for log in logs) > 10
