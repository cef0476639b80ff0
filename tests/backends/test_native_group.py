"""Ranks that meet in shared memory, as threads and as processes: their sums, and how they end.

What a meeting orders, csrc/tests/test_group.cpp has under sanitizers.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from backends.native_cases import Array, native

RANK = """
import sys
import numpy as np
from duetto._native import Group, Member

descriptor, rank, size, rounds = map(int, sys.argv[1:])
member = Member(Group.open(descriptor), rank)
for round in range(rounds):
    x = np.random.default_rng((round, rank)).standard_normal(size, np.float32)
    member.sum(x)
    sys.stdout.buffer.write(x.tobytes())
"""


def numbers_of(round: int, rank: int, size: int) -> Array:
    return np.random.default_rng((round, rank)).standard_normal(size, np.float32)


def summed(round: int, ranks: int, size: int) -> Array:
    """One after the other, as numpy adds."""
    return reduce(add, [numbers_of(round, rank, size) for rank in range(ranks)])


def on_ranks(group: Any, work: Callable[[Any], Any]) -> list[Any]:
    found: dict[int, Any] = {}

    def one(rank: int) -> None:
        found[rank] = work(native.Member(group, rank))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(group.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(group.ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 16, 77, 1000])
def test_the_sum_is_that_of_ranks_in_order(ranks: int, size: int) -> None:
    def work(member: Any) -> list[Array]:
        sums = []
        for round in range(3):
            x = numbers_of(round, member.rank, size)
            member.sum(x)
            sums.append(x)
        return sums

    for found in on_ranks(native.Group(ranks, slot_numbers=64), work):
        for round, x in enumerate(found):
            np.testing.assert_array_equal(x, summed(round, ranks, size))


def test_another_order_would_show() -> None:
    parts = [numbers_of(0, rank, 1000) for rank in range(4)]
    assert (reduce(add, parts[::-1]) != summed(0, 4, 1000)).any()


def test_gather() -> None:
    found = on_ranks(
        native.Group(3, 16), lambda member: member.gather(numbers_of(0, member.rank, 50))
    )
    for all_parts in found:
        np.testing.assert_array_equal(all_parts, [numbers_of(0, rank, 50) for rank in range(3)])


def test_processes_meet_over_a_descriptor() -> None:
    group = native.Group(2, 64)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(group.descriptor), str(rank), "100", "20"],
            pass_fds=[group.descriptor],
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        found = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    expected = b"".join(summed(round, 2, 100).tobytes() for round in range(20))
    assert found == [expected, expected]


def test_a_process_that_ends_ends_the_group() -> None:
    """It comes once and leaves, and is not waited for by its parent: a zombie."""
    group = native.Group(2, 64, timeout_s=1e5)
    child = subprocess.Popen(
        [sys.executable, "-c", RANK, str(group.descriptor), "1", "100", "1"],
        pass_fds=[group.descriptor],
        stdout=subprocess.DEVNULL,
    )
    try:
        member = native.Member(group, 0)
        x = numbers_of(0, 0, 100)
        member.sum(x)
        np.testing.assert_array_equal(x, summed(0, 2, 100))
        with pytest.raises(native.GroupEnded, match=r"^rank 1's process has ended$"):
            member.sum(x)
    finally:
        child.kill()
        child.wait()
    assert group.why_ended == "rank 1's process has ended"


def test_who_is_late_and_who_ends_it_are_told() -> None:
    late = native.Group(2, 16, timeout_s=0.05)
    with pytest.raises(native.GroupEnded, match=r"^rank 1 did not come within 0\.05 s$"):
        native.Member(late, 0).sum(np.ones(1, np.float32))
    ended = native.Group(2, 16)
    assert ended.why_ended is None
    ended.end()
    with pytest.raises(native.GroupEnded, match=r"^the group of ranks was ended$"):
        native.Member(ended, 0).gather(np.ones(1, np.float32))


def test_what_cannot_be_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="2 to 64 ranks, not 1"):
        native.Group(1)
    group = native.Group(2)
    native.Member(group, 1)
    with pytest.raises(ValueError, match=f"rank 1 is taken, by process {os.getpid()}"):
        native.Member(group, 1)
    with pytest.raises(ValueError, match="ranks 0 to 1"):
        native.Member(group, 2)
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        with pytest.raises(ValueError, match="is no group's memory"):
            native.Group.open(file.fileno())
    with pytest.raises(TypeError):
        native.Member(group, 0).sum(np.ones((4, 4), np.float32)[:, :2])
