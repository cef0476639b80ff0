"""What users of the cache may count on, each in few steps; test_pins.py asks planted faults too."""

from collections.abc import Callable
from typing import Any

import pytest
from fakes import make_request
from scheduler.pin_world import PinWorld, pin_swarm, text_of
from scheduler.reuse_world import config, reusing

from duetto.core.cache_control import CachedText, Pin, PinQuotaExceeded
from duetto.core.errors import InvalidRequest
from duetto.scheduler.scheduler import Scheduler

MakeScheduler = Callable[..., Scheduler]
DOCUMENT = (1, 2, 3, 4, 5, 6, 7, 1, 2)  # two blocks of four, and one token more


def small(make: MakeScheduler, **options: int) -> PinWorld:
    return PinWorld(config(**{"num_blocks": 20, "max_model_len": 30, **options}), 0, make)


def document(world: PinWorld, salt: bytes = b"") -> CachedText:
    return text_of(DOCUMENT, world.config, salt)


def run(world: PinWorld, name: str, prompt: tuple[int, ...], max_tokens: int = 1) -> int:
    """Tokens that did not have to be computed."""
    request = make_request(name, prompt, max_tokens)
    world.seen.append(request)
    world.run(request)
    return request.num_cached_tokens


def press(world: PinWorld, name: str = "p") -> None:
    """Requests whose tokens fill the pool twice over."""
    size = 5
    for number in range(size, 2 * world.config.num_blocks, size):
        token = number % 6 + 1
        run(world, f"{name}{number}", (7, token, number // 6 + 1, *([token] * (4 * size - 4))))


def keeps_what_is_pinned_when_others_need_room(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    run(world, "a", DOCUMENT)
    world.pin(b"", document(world))
    press(world)
    assert run(world, "b", DOCUMENT) == 8
    world.unpin(b"", document(world))
    press(world, "q")
    assert run(world, "c", DOCUMENT) == 0


def keeps_what_is_computed_after_it_was_pinned(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    world.pin(b"", document(world))
    run(world, "a", DOCUMENT)
    press(world)
    assert run(world, "b", DOCUMENT) == 8


def ends_a_pin_when_its_time_is_over(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    run(world, "a", DOCUMENT)
    world.pin(b"", document(world), ttl_s=10.0)
    run(world, "newer", (3, 3, 3, 3, 3))
    world.pass_time(9.5)
    press(world)
    assert run(world, "b", DOCUMENT) == 8
    world.pass_time(0.5)
    before = world.scheduler.pool.counts
    run(world, "c", (5,) * 20, 9)
    counts = world.scheduler.pool.counts
    assert counts.ttl - before.ttl == 2, "its blocks were not the first to go"
    assert world.look_up(document(world), DOCUMENT).num_cached == 0


def lets_a_renewed_pin_live_on(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    for ttl_s in (2.0, 5.0, None, 1.0):
        world.pin(b"", document(world), ttl_s=ttl_s)
    world.pin(b"", document(world), ttl_s=5.0)
    world.pass_time(2.0)
    world.list_pins(b"")
    assert len(world.book.pins) == 1
    for number in range(200):  # renewed again and again, it leaves nothing behind
        world.pin(b"", document(world), ttl_s=10.0 + number)


def evicts_the_low_priority_first(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    high, low = (1,) * 9, (2,) * 9
    run(world, "low", low)
    run(world, "high", high)
    run(world, "between", (3,) * 9)
    world.pin(b"", text_of(low, world.config), priority=0)
    world.pin(b"", text_of(high, world.config), priority=80)
    run(world, "newer", (4,) * 9)
    before = world.scheduler.pool.counts.room
    order = []
    for number in range(40):
        world.scheduler.pool.release(world.scheduler.pool.allocate(1))
        run(world, f"n{number}", (5, number % 7 + 1, number // 7 + 1, 1, 6))
        for text in (low, high, (3,) * 9):
            if not world.look_up(text_of(text, world.config), text).ranges and text not in order:
                order.append(text)
    assert order == [low, (3,) * 9]
    assert world.scheduler.pool.counts.room > before


def drops_what_is_free_at_once(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    run(world, "a", DOCUMENT)
    world.pin(b"", document(world))
    reply = world.drop(b"", document(world))
    assert reply is not None and (reply.num_dropped, reply.num_in_use) == (2, 0)
    assert world.scheduler.pool.num_free == 20
    assert run(world, "b", DOCUMENT) == 0


def drops_what_is_in_use_when_it_is_free(make: MakeScheduler = Scheduler) -> None:
    """Those who use it go on; nobody else finds it."""
    world = small(make)
    a, b = make_request("a", DOCUMENT, 9), make_request("b", DOCUMENT, 3)
    world.seen = [a, b]
    world.add(a)
    world.step()
    num_free = world.scheduler.pool.num_free
    reply = world.drop(b"", document(world))
    assert reply is not None and (reply.num_dropped, reply.num_in_use) == (2, 2)
    assert world.scheduler.pool.num_free == num_free
    world.run(b)
    assert b.num_cached_tokens == 0
    assert world.scheduler.pool.num_free == 20


def drops_nothing_that_another_pin_keeps(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    longer = (*DOCUMENT, 5, 5, 5)
    run(world, "a", longer)
    world.pin(b"", document(world))
    world.pin(b"", text_of(longer, world.config))
    reply = world.drop(b"", text_of(longer, world.config))
    assert reply is not None and (reply.num_dropped, reply.num_kept) == (1, 2)
    assert world.look_up(document(world), DOCUMENT).num_cached == 8
    world.pin(b"", text_of(longer, world.config))
    world.unpin(b"", document(world))
    press(world)
    assert run(world, "b", longer) == 8, "the pin that is left keeps it"


def leaves_other_tenants_pins_alone(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    run(world, "a", DOCUMENT)
    world.pin(b"x", document(world))
    world.unpin(b"y", document(world))  # refused: it has none
    world.unpin(b"y", 1)
    world.drop(b"y", 1)
    world.drop(b"y", document(world))
    world.list_pins(b"y")
    world.list_pins(b"x")
    other = document(world, b"another salt")
    assert world.look_up(other, DOCUMENT).num_cached == 0
    press(world)
    assert run(world, "b", DOCUMENT) == 8


def refuses_more_than_a_quota(make: MakeScheduler = Scheduler) -> None:
    world = small(make)  # a quarter of 20 blocks
    assert world.pin(b"x", text_of((1,) * 16, world.config)) is not None
    world.refused(Pin(b"x", text_of((2,) * 8, world.config)), PinQuotaExceeded)
    with pytest.raises(PinQuotaExceeded, match=r"has 2 blocks, 2 of which .* with 4 .* keep 5"):
        world.engine.control(Pin(b"x", text_of((2,) * 8, world.config)))
    assert world.pin(b"x", text_of((*[1] * 16, *[2] * 4), world.config)) is not None  # one more
    assert world.pin(b"y", text_of((3,) * 20, world.config)) is not None
    assert world.pin(b"z", text_of((4,) * 4, world.config)) is None  # half of all is kept
    world.unpin(b"x", 1)
    assert world.pin(b"z", text_of((4,) * 4, world.config)) is None  # the other pin has it all
    world.unpin(b"x", 2)
    assert world.pin(b"z", text_of((4,) * 4, world.config)) is not None


def leaves_room_for_the_longest_request(make: MakeScheduler = Scheduler) -> None:
    """Whatever is pinned."""
    world = small(make, num_blocks=12, max_model_len=33)  # 8 blocks
    for number, tenant in enumerate((b"x", b"y", b"z"), start=1):
        for size in (16, 12, 8, 4):
            text = (number,) * size
            if world.pin(tenant, text_of(text, world.config)) is not None:
                run(world, f"{number} {size}", text)
    assert world.scheduler.pool.counts.num_pinned_blocks == 4
    run(world, "longest", (6,) * 20, 13)
    assert not world.scheduler.pool.counts.quota
    whole = small(make, num_blocks=8, max_model_len=33)
    assert whole.pin(b"", text_of((1,) * 4, whole.config)) is None


def lets_pins_give_way_to_what_could_not_run(make: MakeScheduler = Scheduler) -> None:
    """A request and the texts that it reuses may need the whole pool."""
    world = small(make, num_blocks=12, max_model_len=33)
    text = (1, 2, 3, 4, 5, 6, 7, 1)
    for name, prompt in (("b", (5,) * 4), ("c", (4,) * 4), ("a", text)):
        run(world, name, prompt)
    world.pin(b"x", text_of(text, world.config))
    world.pin(b"y", text_of((5,) * 4, world.config))
    world.pin(b"z", text_of((4,) * 4, world.config))
    request = reusing("r", [text, (2,) * 8], before=(1,), after=(6, 2) * 4, max_tokens=4)
    short = make_request("s", (6,) * 8, 6)
    world.seen += [request, short, make_request("its other text", (2,) * 8)]
    world.add(short)
    world.step()
    world.add(request)
    while "s" in world.scheduler.running:
        world.step()
        assert not world.scheduler.pool.counts.quota, "pins give way although others run"
    while world.engine.has_work:
        world.step()
    world.run()
    assert world.scheduler.pool.counts.quota == 1, "no more gives way than must"
    assert world.look_up(text_of(text, world.config), text).ranges, "what it reuses gave way"
    run(world, "again", (5,) * 5)
    assert world.scheduler.pool.counts.num_pinned_blocks == 4, "it is kept again"


def refuses_what_no_pin_can_mean(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    text = document(world)
    for wrong in (
        Pin(b"", text_of((1, 2, 3), world.config)),
        Pin(b"", text, ttl_s=0.0),
        Pin(b"", text, ttl_s=float("nan")),
        Pin(b"", text, ttl_s=float("inf")),
        Pin(b"", text, priority=-1),
        Pin(b"", text, priority=101),
    ):
        world.refused(wrong, InvalidRequest)


def pages_and_looks_up_segments(make: MakeScheduler = Scheduler) -> None:
    world = small(make)
    text = (3, 1, 4, 1, 5, 2)
    request = reusing("r", [text], max_tokens=2)
    world.seen = [request, make_request("its text", text)]
    world.run(request)
    segment = text_of(text, world.config, is_segment=True)
    assert world.look_up(segment, text).num_cached == 6
    assert world.look_up(text_of(text, world.config), text).num_cached == 4
    world.pin(b"", segment, ttl_s=5.0)
    for number in range(1, 4):
        world.pin(b"", text_of((number,) * 4, world.config))
    world.list_pins(b"", 1)
    world.list_pins(b"", 2)
    press(world)
    assert world.look_up(segment, text).num_cached == 6


def survives_a_swarm(make: MakeScheduler = Scheduler) -> None:
    for seed in range(6):
        pin_swarm(seed, seed % 3, make)


OF_PINS: list[Callable[[Any], None]] = [
    keeps_what_is_pinned_when_others_need_room,
    keeps_what_is_computed_after_it_was_pinned,
    ends_a_pin_when_its_time_is_over,
    lets_a_renewed_pin_live_on,
    evicts_the_low_priority_first,
    drops_what_is_free_at_once,
    drops_what_is_in_use_when_it_is_free,
    drops_nothing_that_another_pin_keeps,
    leaves_other_tenants_pins_alone,
    refuses_more_than_a_quota,
    leaves_room_for_the_longest_request,
    lets_pins_give_way_to_what_could_not_run,
    refuses_what_no_pin_can_mean,
    pages_and_looks_up_segments,
    survives_a_swarm,
]
