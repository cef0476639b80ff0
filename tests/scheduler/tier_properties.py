"""KV that leaves the arena and comes back: what is loaded or computed, and the same answers."""

from collections.abc import Callable
from random import Random
from typing import Any

from fakes import generate_alone, make_request
from scheduler.reuse_world import TEXTS, config, reusing
from scheduler.tier_world import FakeDisk, TierWorld

from duetto.core.batch import MoveResult

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


def no_more_is_read_at_once_than_half_of_ram(**makers: Any) -> None:
    disk = full_disk()
    first = TierWorld(small(), 24, disk, **makers)
    first.run(make_request("a", LONG, 2))
    disk.do_all()
    second = TierWorld(small(), 10, disk, **makers)
    second.known = first.known
    assert second.run(make_request("b", LONG, 2)) == 5 * 4 + 1
    assert second.tiers.counts.num_read == 5


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


PROPERTIES: tuple[Callable[..., None], ...] = (
    what_was_evicted_is_loaded,
    without_tiers_it_is_computed,
    a_text_that_was_evicted_is_loaded,
    a_text_loaded_and_moved_can_be_found_in_the_arena,
    another_start_finds_what_the_disk_has,
    no_more_is_read_at_once_than_half_of_ram,
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
)
