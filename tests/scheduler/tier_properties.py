"""KV that leaves the arena and comes back: what is loaded or computed, and the same answers."""

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from fakes import generate_alone, make_request
from scheduler.pin_world import text_of
from scheduler.reuse_world import TEXTS, config, reusing
from scheduler.tier_world import INT, FakeDisk, TierWorld

from duetto.core.batch import MoveResult
from duetto.core.cache_control import CachedText, FoundRange
from duetto.core.cache_miss import MissReason
from duetto.core.request import Request

LONG = tuple(Random(7).choices(range(1, 8), k=40))  # ten blocks of four
OTHER = tuple(Random(8).choices(range(1, 8), k=60))


def small(**options: int):
    return config(**{"num_blocks": 18, **options})


def full_disk(num_blocks: int = 100) -> FakeDisk:
    return FakeDisk(num_blocks, Random(0))


def what_was_evicted_is_loaded(**makers: Any) -> None:
    world = TierWorld(small(), **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2))  # takes the arena
    assert world.run(make_request("c", LONG, 2)) == 4 + 1  # the last block, and an answer's token
    assert world.tiers.counts.num_loaded == 7  # two were still there


def without_tiers_it_is_computed(**makers: Any) -> None:
    """Or the test above would show nothing."""
    world = TierWorld(small(), 0, **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2))
    assert world.run(make_request("c", LONG, 2)) > 20


def a_text_that_was_evicted_is_loaded(**makers: Any) -> None:
    world = TierWorld(config(num_blocks=22), **makers)
    world.run(reusing("a", [TEXTS[2], TEXTS[3]]))
    world.run(make_request("b", OTHER, 2), make_request("d", [*reversed(OTHER)], 2))
    own = 2 + 3 + 3  # before the texts, after them, the answer but its last token
    assert world.run(reusing("c", [TEXTS[3], TEXTS[2]])) == own
    assert world.tiers.counts.num_loaded == 7


def a_text_loaded_and_moved_can_be_found_in_the_arena(**makers: Any) -> None:
    world = TierWorld(config(num_blocks=22), **makers)
    world.run(reusing("a", [TEXTS[2]]))
    world.run(make_request("b", OTHER, 2), make_request("e", [*reversed(OTHER)], 2))
    world.run(reusing("c", [TEXTS[2]]), reusing("d", [TEXTS[2]]))
    assert world.tiers.counts.num_loaded == 3


def another_start_finds_what_the_disk_has(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 24, disk, **makers)
    second.known = first.known
    assert second.run(make_request("b", LONG, 2)) == 4 + 1
    assert second.tiers.counts.num_read == 9


def who_is_alone_may_hold_all_of_ram_and_others_half(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2), make_request("b", OTHER, 2))
    disk.do_all()
    second = TierWorld(small(), 10, disk, **makers)
    second.known = first.known
    assert second.run(make_request("c", LONG, 2)) == 1 * 4 + 1
    assert second.tiers.counts.num_read == 9
    third = TierWorld(small(), 12, disk, **makers)
    third.known = first.known
    disk.take_results = list  # type: ignore[method-assign,assignment]
    third.add(make_request("d", LONG, 2))
    third.add(make_request("e", OTHER, 2))
    third.step()
    assert third.tiers._ram.num_held == 9


def what_a_disk_fails_to_read_is_computed(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    del disk.blocks[[*disk.blocks][3]]
    second = TierWorld(small(), 24, disk, **makers)
    second.known = first.known
    second.tiers._on_disk = set(first.known)
    assert second.run(make_request("b", LONG, 2)) == 7 * 4 + 1
    assert second.tiers.counts.num_failed == 6
    second.scheduler.pool.forget_all()
    second.run(make_request("c", LONG, 2))
    assert second.tiers.counts.num_failed == 6


def a_disk_that_never_answers_is_not_waited_for(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 24, disk, **makers)
    second.known = first.known
    disk.wait = lambda *_: None  # type: ignore[method-assign]
    disk.take_results = list  # type: ignore[method-assign,assignment]
    second.add(make_request("b", LONG, 2))
    for _ in range(30):
        second.step()
    assert not second.tokens["b"]
    second.now = 60.0
    for _ in range(5):
        second.step()
    assert len(second.tokens["b"]) == 2


def others_are_computed_while_one_waits_for_the_disk(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 24, disk, **makers)
    second.known = first.known
    disk.take_results = list  # type: ignore[method-assign,assignment]
    second.add(make_request("b", LONG, 2))
    second.add(make_request("c", (1, 2, 3), 2))
    second.step()
    second.step()
    assert len(second.tokens["c"]) == 2 and not second.tokens["b"]


def loading_that_is_dearer_than_computing_is_left(**makers: Any) -> None:
    world = TierWorld(small(), step_time=lambda shape: 1e-3 * shape.num_tokens, **makers)
    world.run(make_request("a", LONG, 2))
    world.tiers._prices._seconds["ram", "arena"] = 1.0
    world.run(make_request("b", OTHER, 2))
    assert world.run(make_request("c", LONG, 2)) > 20


def what_falls_out_of_ram_is_on_the_disk(**makers: Any) -> None:
    disk = full_disk()
    disk.is_behind = True  # nothing is written when it is published
    world = TierWorld(small(), 4, disk, **makers)
    world.run(make_request("a", LONG, 2))
    disk.is_behind = False
    world.run(make_request("b", OTHER, 2))
    disk.do_all()
    assert disk.blocks.keys() & set(world.keys_of(LONG))


def who_has_the_most_loses_first(**makers: Any) -> None:
    world = TierWorld(config(num_blocks=20), 8, **makers)
    world.run(make_request("a", LONG[:12], 1, tenant=b"small"))
    world.run(make_request("b", OTHER, 2, tenant=b"large"))
    world.run(make_request("c", [*reversed(OTHER)], 2, tenant=b"large"))
    held = [*world.tiers._ram._tenant_of.values()]
    assert held.count(b"small") == 3 and held.count(b"large") == 5


def nothing_is_found_before_its_move_is_reported(**makers: Any) -> None:
    world = TierWorld(small(), **makers)
    world.run(make_request("a", LONG, 2))
    world.executor.mover.results = lambda _awaits: ()  # type: ignore[method-assign]
    world.run(make_request("b", OTHER, 2))
    world.now = 10.0
    assert world.run(make_request("c", LONG, 2)) > 20
    assert world.tiers.counts.num_kept == 0


def a_result_is_told_until_it_was_taken_and_counts_once(**makers: Any) -> None:
    world = TierWorld(small(), **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2))
    world.run(make_request("c", LONG, 2))
    before = world.tiers.num_taken
    world.tiers.take([MoveResult(0, 1)])
    assert world.tiers.num_taken == before
    world.run(make_request("d", OTHER, 2))
    assert not world.tiers._open


def a_step_that_fails_is_computed_again_with_its_moves_done_once(**makers: Any) -> None:
    for where in ("fails_before_moving", "fail_next", "fail_after_writing"):
        for step in range(3):  # of both
            _fail(where, step, **makers)


def _fail(where: str, step: int, **makers: Any) -> None:
    """A step that loads, evicts, and computes for several."""
    world = TierWorld(small(num_blocks=26), **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2), make_request("c", [*reversed(OTHER)], 2))
    requests = make_request("d", LONG, 3), make_request("e", (1, 2, 3), 5)
    for request in requests:
        world.add(request)
    for _ in range(step):
        world.step()
    setattr(world.executor, where, True)
    for _ in range(20):
        if world.engine.has_work:
            world.step()
    for request in requests:
        assert world.tokens[request.request_id] == generate_alone(request)
    assert world.tiers.counts.num_loaded > 5
    setattr(world.executor, where, False)
    world.run(make_request("f", OTHER, 2))


def what_a_failed_step_did_not_move_has_a_result(**makers: Any) -> None:
    """Nobody computes it again, as it was of one request."""
    world = TierWorld(small(), **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2))
    world.add(make_request("c", LONG, 2))
    world.executor.fails_before_moving = True
    (update,) = world.engine.step().updates
    assert update.error is not None
    world.run(make_request("d", LONG, 2))
    world.run(make_request("e", OTHER, 2))
    assert not world.tiers._open and world.tiers.counts.num_failed > 0


def forgotten_is_forgotten_though_it_was_on_its_way(**makers: Any) -> None:
    disk = full_disk()
    world = TierWorld(small(), 24, disk, **makers)
    take_results, disk.take_results = disk.take_results, list  # type: ignore[method-assign,assignment]
    world.run(make_request("a", LONG, 2))
    world.scheduler.forget_cached()
    disk.take_results = take_results  # type: ignore[method-assign]
    disk.do_all()
    world.run(make_request("c", (1, 2), 2))  # which is told of what arrived
    assert world.run(make_request("b", LONG, 2)) == 40 + 1


def two_that_need_the_same_load_it_once(**makers: Any) -> None:
    world = TierWorld(small(num_blocks=40), **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2), make_request("c", [*reversed(OTHER)], 2))
    num_there = len([key for key in world.keys_of(LONG)[:9] if key in world.found])
    before = world.tiers.counts.num_loaded
    first, second = make_request("d", LONG, 2), make_request("e", LONG, 2, seed=3)
    assert world.run(first, second) == 2 * (4 + 1)
    assert 0 < world.tiers.counts.num_loaded - before == 9 - num_there


def who_ends_while_waiting_holds_nothing(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 24, disk, **makers)
    second.known = first.known
    disk.take_results = list  # type: ignore[method-assign,assignment]
    second.add(make_request("b", LONG, 2))
    second.step()
    assert second.tiers._ram.num_held == 9
    second.engine.abort("b")
    assert second.tiers._ram.num_held == 0


def what_the_disk_has_dropped_is_not_asked_for(**makers: Any) -> None:
    disk = full_disk(5)
    world = TierWorld(small(), 24, disk, **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2))
    disk.do_all()
    world.run(make_request("c", LONG, 2))
    disk.do_all()
    world.run(make_request("d", (1, 2), 2))  # publishes nothing
    assert world.tiers._on_disk <= set(disk.blocks)


def a_queue_that_is_full_loses_nothing_but_copies(**makers: Any) -> None:
    disk = full_disk()
    disk.is_behind = True
    world = TierWorld(small(), 24, disk, **makers)
    world.run(make_request("a", LONG, 2))
    disk.do_all()
    assert not disk.blocks and world.tiers.counts.num_failed == 10


# --- what users drop and look up ---------------------------------------------------------------


def long_text(world: TierWorld) -> CachedText:
    return text_of(LONG, world.scheduler.config)


def miss_of(world: TierWorld, request: Request) -> MissReason | None:
    world.run(request)
    miss = request.timings.cache_miss
    return None if miss is None else miss.reason


def what_is_dropped_is_not_there_after_another_start(**makers: Any) -> None:
    """Wherever it was: in memory, in RAM, on the disk or waiting to be written."""
    for num_others, is_written in ((0, True), (0, False), (2, True), (2, False)):
        disk = full_disk()
        first = TierWorld(small(), 24, disk, **makers)
        first.run(make_request("a", LONG, 2))
        for number in range(num_others):
            first.run(make_request(f"b{number}", OTHER, 2, seed=number))
        if is_written:
            disk.do_all()
        reply = first.drop(long_text(first))
        assert reply.num_in_tiers == 10 or not is_written
        first.run(make_request("c", (1, 2), 2))
        first.check_disk()
        assert len(disk.blocks.keys() & set(first.keys_of(LONG))) == 0
        second = TierWorld(small(), 24, disk, **makers)
        second.known = first.known
        assert not second.look_up(long_text(second)).ranges
        assert miss_of(second, make_request("b", LONG, 2)) is MissReason.NEVER_SEEN


def a_drop_is_done_though_nobody_asks_for_anything(**makers: Any) -> None:
    disk = full_disk()
    world = TierWorld(small(), 24, disk, **makers)
    world.run(make_request("a", LONG, 2))
    disk.do_all()
    world.drop(long_text(world))
    assert world.engine.has_work
    world.run()
    world.check_disk()


def a_drop_leaves_what_others_have_on_the_disk(**makers: Any) -> None:
    disk = full_disk()
    world = TierWorld(small(), 24, disk, **makers)
    world.run(make_request("a", LONG, 2), make_request("b", OTHER[:16], 2))
    disk.do_all()
    world.drop(long_text(world))
    world.run()
    disk.do_all()
    assert {*world.keys_of(OTHER[:16])} <= disk.blocks.keys()


def what_is_dropped_and_computed_again_is_kept(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    for name in "ab":
        first.drop(long_text(first))
        first.run(make_request(name, LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 24, disk, **makers)
    second.known = first.known
    assert second.run(make_request("c", LONG, 2)) == 4 + 1


def what_is_read_while_it_is_dropped_is_computed(**makers: Any) -> None:
    """What was on its way to RAM is not there when it arrives."""
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 24, disk, **makers)
    second.known = first.known
    take_results, disk.take_results = disk.take_results, list  # type: ignore[method-assign,assignment]
    second.add(make_request("b", LONG, 2))
    second.step()
    assert second.tiers.awaited()
    second.drop(long_text(second))
    disk.take_results = take_results  # type: ignore[method-assign]
    assert second.run(make_request("c", (1, 2), 2)) == 40 + 1 + 2 + 1
    assert second.tiers.counts.num_loaded == 0


def a_drop_whose_step_never_came_is_done_by_another(**makers: Any) -> None:
    disk = full_disk()
    world = TierWorld(small(), 24, disk, **makers)
    world.run(make_request("a", LONG, 2))
    disk.do_all()
    world.drop(long_text(world))
    world.add(make_request("c", (3, 2, 1), 2))
    world.executor.fails_before_moving = True
    (update,) = world.engine.step().updates
    assert update.error is not None
    for number in range(3):
        world.run(make_request(f"d{number}", (number + 1,) * 5, 2))  # which is written
    world.check_disk()
    assert not disk.blocks.keys() & set(world.keys_of(LONG))


def a_look_up_says_where_each_part_is(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 6, disk, **makers)
    second.known = first.known
    found = second.look_up(long_text(second))
    assert found.ranges == (FoundRange(0, 40, None, "disk"),)
    assert (found.num_cached, found.num_loadable) == (0, 24)  # what RAM holds
    request = make_request("b", LONG, 2)
    second.run(request)
    assert request.num_cached_tokens == 24
    for size in (32, 56):  # the last blocks leave memory first, and then RAM
        second.run(make_request(f"c{size}", OTHER[:size], 2))
    found = second.look_up(long_text(second))
    assert [one.tier for one in found.ranges] == ["memory", "ram", "disk"]
    request = make_request("d", LONG, 2)
    second.run(request)
    assert request.num_cached_tokens == found.num_cached + found.num_loadable


def a_look_up_ends_at_a_gap(**makers: Any) -> None:
    world = TierWorld(small(), 24, full_disk(), **makers)
    world.run(make_request("a", LONG, 2))
    keys = world.keys_of(LONG)
    world.drop(CachedText(4, (keys[3],)))
    found = world.look_up(long_text(world))
    assert found.ranges == (FoundRange(0, 12, 35),) and found.num_cached == 12


def who_misses_what_only_tiers_had_is_told_of_the_drop(**makers: Any) -> None:
    world = TierWorld(small(), 24, **makers)
    world.run(make_request("a", LONG, 2))
    world.run(make_request("b", OTHER, 2), make_request("c", [*reversed(OTHER)], 2))
    text = long_text(world)
    assert {one.tier for one in world.look_up(text).ranges} == {"ram"}
    assert world.drop(text).num_in_tiers == 10
    assert miss_of(world, make_request("d", LONG, 2)) is MissReason.DROPPED
    world.run(make_request("e", OTHER, 2))
    world.tiers.forget_all()
    assert miss_of(world, make_request("g", LONG, 2)) is MissReason.EVICTED


def nothing_of_others_lies_behind_a_texts_last_token(**makers: Any) -> None:
    """What lay in its last block before is somebody else's. Not in RAM, nor on the disk."""
    disk = full_disk()
    world = TierWorld(config(num_blocks=22), 24, disk, **makers)
    for number in range(3):  # all blocks have been somebody's
        world.run(make_request(f"a{number}", [*reversed(OTHER)], 20, seed=number))
    world.run(reusing("b", [TEXTS[0]]))
    (_, last) = text_of(TEXTS[0], world.scheduler.config, is_segment=True).hashes
    disk.do_all()
    kv, tokens = np.frombuffer(disk.blocks[last], INT).reshape(2, 4).tolist()
    assert (kv[1:], tokens) == ([0] * 3, [TEXTS[0][4], 0, 0, 0])
    world.run(make_request("c", OTHER, 2), make_request("d", [*reversed(OTHER)], 2))
    in_ram = world.executor.mover._ram[world.tiers._ram.slot(last)].view(INT).tolist()
    assert in_ram == [*kv, *tokens]
    assert world.run(reusing("e", [TEXTS[0]])) == 2 + 3 + 3


PROPERTIES: tuple[Callable[..., None], ...] = (
    what_was_evicted_is_loaded,
    without_tiers_it_is_computed,
    a_text_that_was_evicted_is_loaded,
    a_text_loaded_and_moved_can_be_found_in_the_arena,
    another_start_finds_what_the_disk_has,
    who_is_alone_may_hold_all_of_ram_and_others_half,
    what_a_disk_fails_to_read_is_computed,
    a_disk_that_never_answers_is_not_waited_for,
    others_are_computed_while_one_waits_for_the_disk,
    loading_that_is_dearer_than_computing_is_left,
    what_falls_out_of_ram_is_on_the_disk,
    who_has_the_most_loses_first,
    nothing_is_found_before_its_move_is_reported,
    a_result_is_told_until_it_was_taken_and_counts_once,
    a_step_that_fails_is_computed_again_with_its_moves_done_once,
    what_a_failed_step_did_not_move_has_a_result,
    forgotten_is_forgotten_though_it_was_on_its_way,
    two_that_need_the_same_load_it_once,
    who_ends_while_waiting_holds_nothing,
    what_the_disk_has_dropped_is_not_asked_for,
    a_queue_that_is_full_loses_nothing_but_copies,
    what_is_dropped_is_not_there_after_another_start,
    a_drop_is_done_though_nobody_asks_for_anything,
    a_drop_leaves_what_others_have_on_the_disk,
    what_is_dropped_and_computed_again_is_kept,
    what_is_read_while_it_is_dropped_is_computed,
    a_drop_whose_step_never_came_is_done_by_another,
    a_look_up_says_where_each_part_is,
    a_look_up_ends_at_a_gap,
    who_misses_what_only_tiers_had_is_told_of_the_drop,
    nothing_of_others_lies_behind_a_texts_last_token,
)
