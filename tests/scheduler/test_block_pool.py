import hashlib
from collections.abc import Callable

import pytest

from duetto.scheduler.block_pool import BlockPool, next_hash, root_hash


def test_blocks_are_handed_out_from_the_first_on() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == 1
    pool.check([[0, 1, 2]])


def test_allocating_nothing_takes_nothing() -> None:
    pool = BlockPool(1)
    assert pool.allocate(0) == []
    assert pool.num_free == 1


def test_more_than_is_free_is_a_bug_and_takes_nothing() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    pool.check([])


def test_a_published_block_is_found_until_it_is_taken_again() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    assert pool.find([b"a"]) == []
    pool.publish(block, b"a")
    pool.release([block])
    assert pool.find([b"a"]) == [block]
    pool.allocate(2)
    assert pool.find([b"a"]) == []


def test_only_an_unbroken_prefix_is_found() -> None:
    pool = BlockPool(3)
    for block, block_hash in zip(pool.allocate(2), [b"a", b"c"], strict=True):
        pool.publish(block, block_hash)
    assert pool.find([b"a", b"b", b"c"]) == [0]
    assert pool.find([b"b", b"c"]) == []


def test_a_shared_block_is_free_when_its_last_owner_leaves() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.retain([block])
    pool.check([[block], [block]])
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2
    pool.check([])


def test_a_reused_block_is_not_evicted() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.release([block])
    pool.retain([block])
    assert pool.allocate(1) == [1]
    assert pool.find([b"a"]) == [block]


def test_room_is_counted_beside_the_free_blocks_that_would_be_reused() -> None:
    pool = BlockPool(4)
    owned, free = pool.allocate(2)
    pool.release([free])
    assert pool.num_free == 3
    assert pool.num_free_beside([owned, free]) == 2


def test_the_first_block_to_hold_a_prefix_stays_the_one() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.publish(first, b"b")
    assert pool.find([b"a"]) == [first]
    assert pool.find([b"b"]) == []
    pool.check([[first, second]])


@pytest.mark.parametrize("act", [lambda p: p.release([0]), lambda p: p.publish(0, b"a")])
def test_a_block_without_an_owner_is_neither_released_nor_published(
    act: Callable[[BlockPool], None],
) -> None:
    with pytest.raises(AssertionError, match="no owner"):
        act(BlockPool(1))


def test_forgetting_all_leaves_blocks_to_their_owners() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.forget_all()
    assert pool.find([b"a"]) == []
    pool.check([[block]])
    pool.publish(block, b"a")  # it may be found again
    assert pool.find([b"a"]) == [block]


@pytest.mark.parametrize("tables", [[[0]], [[0, 1], [1]], [[0, 0, 1]], [[]]])
def test_check_finds_tables_that_differ_from_the_counts(tables: list[list[int]]) -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    pool.check([[0, 1]])
    with pytest.raises(AssertionError):
        pool.check(tables)


# --- hashes --------------------------------------------------------------------------------


def test_a_hash_stands_for_the_whole_prefix() -> None:
    root = root_hash(b"", b"")
    one_two = next_hash(next_hash(root, [1]), [2])
    assert one_two == next_hash(next_hash(root, [1]), [2])
    others = [next_hash(root, [2]), next_hash(root, [1, 2]), next_hash(next_hash(root, [3]), [2])]
    assert len({one_two, *others}) == 4


def test_namespaces_and_salts_never_run_into_one_another() -> None:
    fields = [(b"", b""), (b"a", b""), (b"", b"a"), (b"ab", b"c"), (b"a", b"bc")]
    assert len({root_hash(*pair) for pair in fields}) == len(fields)


def test_hashes_are_sha256_so_that_nobody_can_make_two_prefixes_collide() -> None:
    assert len(root_hash(b"", b"")) == len(next_hash(b"\0" * 32, [1])) == 32
    words = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    length = (16).to_bytes(8, "little")
    assert next_hash(b"p" * 32, [1, 2]) == hashlib.sha256(b"p" * 32 + length + words).digest()
