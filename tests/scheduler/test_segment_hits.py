"""What a request is told of its segments: what was there, and why the rest was not."""

from fakes import make_request
from scheduler.reuse_world import TEXTS, World, config, reusing

from duetto.core.cache_miss import MissReason, SegmentHit
from duetto.core.request import Request

NEVER, EVICTED = MissReason.NEVER_SEEN, MissReason.EVICTED


def hits(world: World, request: Request) -> tuple[SegmentHit, ...]:
    world.seen.append(request)
    world.run(request)
    return request.timings.segment_hits


def test_what_was_there_and_what_was_not() -> None:
    world = World(config())
    first = hits(world, reusing("a", [TEXTS[1], TEXTS[2]]))
    assert first == (SegmentHit(2, 10, 0, NEVER), SegmentHit(10, 21, 0, NEVER))
    second = hits(world, reusing("b", [TEXTS[2], TEXTS[3], TEXTS[2]]))
    assert second == (SegmentHit(2, 13, 11), SegmentHit(13, 29, 0, NEVER), SegmentHit(29, 40, 11))


def test_what_is_not_moved_says_why() -> None:
    world = World(config())
    found = hits(world, reusing("a", [TEXTS[1], TEXTS[4], TEXTS[2]], before=(), num_first=3))
    expected = [MissReason.AT_START, MissReason.ALL_COMPUTED, NEVER]
    assert [hit.miss for hit in found] == expected


def test_what_was_evicted_is_said_to_be() -> None:
    world = World(config())
    hits(world, reusing("a", [TEXTS[1]]))
    world.scheduler.pool.release(world.scheduler.pool.allocate(world.scheduler.pool.num_free))
    assert hits(world, reusing("b", [TEXTS[1]])) == (SegmentHit(2, 10, 0, EVICTED),)
    world.scheduler.pool.forget_all()
    assert hits(world, reusing("c", [TEXTS[1]])) == (SegmentHit(2, 10, 0, MissReason.DROPPED),)


def test_what_another_tenant_has_is_not_there() -> None:
    world = World(config())
    hits(world, reusing("a", [TEXTS[1]]))
    salted = hits(world, reusing("b", [TEXTS[1]], cache_salt=b"another"))
    assert salted == (SegmentHit(2, 10, 0, MissReason.OTHER_SALT),)


def test_where_a_text_differs_from_one_that_begins_alike() -> None:
    world = World(config())
    texts = [(1, 2, 3, 4, 5, 6, 7, 1), (1, 2, 3, 4, 5, 6, 0), (1, 2, 3, 4, 5, 6)]
    world.seen = [make_request("t", text) for text in texts]
    hits(world, reusing("a", texts[:1]))
    longer = hits(world, reusing("b", texts[1:2]))
    assert longer == (SegmentHit(2, 9, 4, MissReason.DIFFERS, 6),)
    shorter = hits(world, reusing("c", texts[2:]))
    assert shorter == (SegmentHit(2, 8, 4, MissReason.DIFFERS, 6),)  # it ends there


def test_of_what_has_no_segments_nothing_is_told() -> None:
    assert hits(World(config()), reusing("a", [])) == ()
