"""The index of prefix blocks by worker, against a dict of sets."""

import random

import pytest

from duetto.routing.prefix_index import PrefixIndex


def chain(seed: int, length: int) -> list[bytes]:
    return [bytes([seed, index]) * 16 for index in range(length)]


def first_blocks(held: dict[str, set[bytes]], hashes: list[bytes]) -> dict[str, int]:
    """What `cached` says, the slow way."""
    counts = {}
    for worker, has in held.items():
        count = next((i for i, h in enumerate(hashes) if h not in has), len(hashes))
        if count:
            counts[worker] = count
    return counts


def test_counts_the_first_blocks_that_each_worker_has():
    index = PrefixIndex()
    hashes = chain(1, 5)
    index.stored("a", hashes[:3])
    index.stored("b", [*hashes[:1], *hashes[2:]])  # the second is missing: only the first counts
    index.stored("c", hashes[1:])  # without the first: nothing
    index.stored("d", hashes)
    assert index.cached(hashes) == {"a": 3, "b": 1, "d": 5}
    assert index.cached(chain(2, 5)) == {}
    assert index.cached([]) == {}


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_sets_over_random_lives(seed):
    rng = random.Random(seed)
    index, held = PrefixIndex(), {}
    names = [f"w{number}" for number in range(rng.choice([2, 9, 40]))]
    chains = [chain(number, 12) for number in range(6)]
    for _ in range(300):
        worker, hashes = rng.choice(names), rng.choice(chains)
        some = hashes[: rng.randrange(13)]
        match rng.choice(["stored"] * 6 + ["removed"] * 4 + ["cleared", "left"]):
            case "stored":
                assert index.stored(worker, some) == 0
                held.setdefault(worker, set()).update(some)
            case "removed":
                some = rng.sample(hashes, rng.randrange(4))
                index.removed(worker, some)
                held.get(worker, set()).difference_update(some)
            case "cleared":
                index.cleared(worker)
                held[worker] = set()
            case "left":
                index.left(worker)
                held.pop(worker, None)
        asked = rng.choice(chains)[: rng.randrange(13)]
        assert index.cached(asked) == first_blocks(held, asked)
        assert index.num_blocks(worker) == len(held.get(worker, ()))
        assert index.holding(worker) == held.get(worker, set())


def test_nothing_is_left_of_workers_that_left():
    index = PrefixIndex()
    hashes = [number.to_bytes(32, "big") for number in range(2000)]
    for life in range(50):  # one that starts again and again takes no more memory
        index.stored(f"life {life}", hashes)
        index.stored("b", [hashes[-1]])
        index.left(f"life {life}")
        assert len(index._workers) <= 16
    while index._gone:
        index.stored("b", [])
    assert len(index) == 1
    assert index.cached(hashes[-1:]) == {"b": 1}


def test_a_bit_is_given_away_only_once_no_entry_has_it():
    index = PrefixIndex()
    hashes = [number.to_bytes(32, "big") for number in range(5000)]
    index.stored("a", hashes)
    index.left("a")
    index.stored("b", [b"another"])  # while most of a's entries are not swept yet
    assert index.cached(hashes) == {}
    assert index.num_blocks("b") == 1


def test_is_bounded():
    index = PrefixIndex(max_blocks=10, max_blocks_per_worker=8)
    assert index.stored("a", chain(1, 9)) == 1
    assert index.stored("b", chain(2, 5)) == 3
    assert index.stored("b", chain(1, 8)) == 2  # what is there already takes no entry
    assert len(index) == 10
    index.removed("a", chain(1, 8))  # b still has six of them
    assert index.num_blocks("a") == 0
    assert index.stored("a", chain(3, 3)) == 1
    index.cleared("b")
    assert index.stored("a", chain(4, 3)) == 0


def test_a_set_of_workers_is_one_object():
    index = PrefixIndex()
    for worker in ("a", "b", "c"):
        index.stored(worker, chain(1, 12))
    assert len({id(mask) for mask in index._holders.values()}) == 1
