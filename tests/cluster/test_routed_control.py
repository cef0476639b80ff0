"""What users ask of the KV cache behind a router: asked of all workers, answered as one."""

from dataclasses import replace

import pytest
from cluster_world import CONFIG
from fakes import make_request
from routed_world import routed, shadow_engines

from duetto.cluster.router import NO_WORKER
from duetto.core.cache_control import (
    CachedText,
    Drop,
    ListPins,
    LookUp,
    Pin,
    PinNotFound,
    Unpin,
)
from duetto.core.errors import EngineError, InvalidRequest
from duetto.scheduler.block_pool import next_hash, root_hash

DEADLINE_S = 20.0


def text_of(prompt):
    size, parent, hashes = CONFIG.block_size, root_hash(CONFIG.cache_namespace, b""), []
    for start in range(0, len(prompt) - size + 1, size):
        parent = next_hash(parent, prompt[start : start + size])
        hashes.append(parent)
    return CachedText(len(prompt), tuple(hashes))


PROMPT = tuple(range(1, 22))
TEXT = text_of(PROMPT)


def ask(router, message):
    return router.control(message).result(DEADLINE_S)


def warm(router, heard, name="warm", prompt=PROMPT):
    router.add(make_request(name, prompt, max_tokens=1))
    heard.final(name)


def test_a_look_up_finds_what_the_best_worker_has():
    with routed(shadow_engines(3), "round-robin") as (router, heard):
        assert ask(router, LookUp(TEXT)).num_cached == 0
        warm(router, heard)
        found = ask(router, LookUp(TEXT, segments=(TEXT, text_of((5,) * 8))))
        assert (found.num_cached, found.num_tokens) == (20, 21)
        assert [segment.num_cached for segment in found.segments] == [20, 0]


def test_a_pin_holds_wherever_its_text_is_computed():
    with routed(shadow_engines(3), "round-robin") as (router, heard):
        pinned = ask(router, Pin(b"t", TEXT))
        assert (pinned.pin.number, pinned.pin.num_cached) == (1, 0)
        for name in "abc":
            warm(router, heard, name)
        pages = ask(router, ListPins(b"t"))
        assert [(pin.number, pin.num_cached) for pin in pages.pins] == [(1, 20)]
        assert pages.usage.num_kept == 3 * 5
        ended = ask(router, Unpin(b"t", 1))
        assert ended.pin.number == 1
        assert ask(router, ListPins(b"t")).pins == []
        with pytest.raises(PinNotFound):
            ask(router, Unpin(b"t", 1))


def test_numbers_are_the_tenants_own_and_the_same_for_one_text():
    with routed(shadow_engines(2)) as (router, _heard):
        other = text_of(range(50, 70))
        numbers = [
            ask(router, Pin(tenant, text)).pin.number
            for tenant, text in ((b"a", TEXT), (b"b", other), (b"a", other), (b"a", TEXT))
        ]
        assert numbers == [1, 1, 2, 1]
        with pytest.raises(PinNotFound):
            ask(router, Unpin(b"b", 2))
        page = ask(router, ListPins(b"a", limit=1))
        assert ([pin.number for pin in page.pins], page.has_more) == ([1], True)
        page = ask(router, ListPins(b"a", after=1))
        assert ([pin.number for pin in page.pins], page.has_more) == ([2], False)


def test_a_drop_forgets_everywhere():
    with routed(shadow_engines(2), "round-robin") as (router, heard):
        for name in "ab":
            warm(router, heard, name)
        number = ask(router, Pin(b"t", TEXT)).pin.number
        dropped = ask(router, Drop(b"t", number))
        assert (dropped.num_dropped, dropped.has_ended_pin) == (2 * 5, True)
        assert dropped.counts.dropped == 2 * 5
        assert ask(router, LookUp(TEXT)).num_cached == 0
        with pytest.raises(PinNotFound):
            ask(router, Drop(b"t", number))


def test_what_all_refuse_is_refused_with_their_words():
    with routed(shadow_engines(2)) as (router, _heard):
        with pytest.raises(InvalidRequest, match="ttl_s"):
            ask(router, Pin(b"t", TEXT, ttl_s=-1.0))
        assert ask(router, ListPins(b"t")).pins == []


def test_pins_of_a_worker_that_left_are_gone_once_no_other_keeps_them():
    with routed(shadow_engines(2)) as (router, _heard):
        ask(router, Pin(b"t", TEXT))
        first, second = (worker.handle for worker in router.workers)
        router.leave(first)
        first.stop(DEADLINE_S)
        assert [pin.number for pin in ask(router, ListPins(b"t")).pins] == [1]
        router.leave(second)
        second.stop(DEADLINE_S)
        with pytest.raises(EngineError, match=NO_WORKER):
            ask(router, Unpin(b"t", 1))


def test_a_pin_whose_time_is_over_is_no_longer_listed():
    now = [0.0]
    engines = shadow_engines(2)
    for engine in engines:
        engine._clock = lambda: now[0]
    with routed(engines) as (router, _heard):
        ask(router, Pin(b"t", TEXT, ttl_s=5.0))
        ask(router, Pin(b"t", replace(TEXT, hashes=TEXT.hashes[:2], num_tokens=8)))
        now[0] = 6.0
        assert [pin.number for pin in ask(router, ListPins(b"t")).pins] == [2]
        with pytest.raises(PinNotFound):
            ask(router, Unpin(b"t", 1))
