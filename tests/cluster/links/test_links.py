"""Both links, by their two ends in one process: equal bytes, order, and the end."""

import gc
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from link_world import World, blocks_of, bytes_in, empty_like, random_rows, send_all, wait_until

from duetto.cluster.links import rows as rows_module
from duetto.cluster.links.choose import connect_link, listen_for_links
from duetto.cluster.links.link import BlockRows, LinkLost, RowsSent

ADDRESSES = ["shm://*", "tcp://127.0.0.1:*"]


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Pair:
    """A listener, who called, and both users."""

    def __init__(self, address: str, **options: Any) -> None:
        self.a, self.b = World(), World()
        self.ends: list[Any] = []
        self.listener = listen_for_links(address, self._accept, **options)
        self.to_b: Any = connect_link(self.listener.address, self.a, **options)
        wait_until(lambda: self.ends)
        self.to_a: Any = self.ends[0]

    def _accept(self, end: Any) -> World:
        self.ends.append(end)
        return self.b

    def close(self) -> None:
        self.listener.close()
        for end in (self.to_b, self.to_a):
            end.close()
            assert end.join(30)


@pytest.fixture(params=ADDRESSES)
def pair(request):
    made = Pair(request.param)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_stays():
    gc.collect()
    before = num_files()
    yield
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("duetto-link")])
    gc.collect()
    wait_until(lambda: num_files() <= before)


SHAPES = [
    (1, (1,), 1),
    (7, (64,), 7),
    (40, (512,), 33),
    (9, (8192, 96, 8192, 96), 8),  # keys, scales, values, scales
    (3, (3 << 20,), 2),  # a block is larger than a part, and than the ring
    (500, (4096,), 499),  # some parts
    (300, (1000, 24), 257),  # no power of two
]


def test_equal_bytes_for_many_shapes(pair):
    for number, (num_blocks, sizes, count) in enumerate(SHAPES):
        sent = random_rows(number, num_blocks, sizes, count)
        pair.b.expected[number, 1] = places = empty_like(sent, num_blocks + 3, number)
        send_all(pair.to_b, number, 1, sent)
        pair.to_b.send(b"%d" % number)
        pair.b.wait_for(lambda told, number=number: b"%d" % number in told)
        assert pair.b.num_arrived(number) == count  # before the frame
        assert bytes_in(places) == bytes_in(sent)
        untouched = np.setdiff1d(np.arange(num_blocks + 3), places.blocks)
        assert not any(array[untouched].any() for array in places.arrays)
    assert pair.b.reasons() == pair.a.reasons() == []


def test_the_memory_may_be_written_again_once_it_is_sent(pair):
    sent = random_rows(1, 64, (16384,), 64)
    places = [empty_like(sent, 64, n) for n in range(5)]
    wanted = []
    for number, one in enumerate(places):
        pair.b.expected[number, 0] = one
        send_all(pair.to_b, number, 0, sent)
        wanted.append(bytes_in(sent))
        sent.arrays[0][:] += 1
    pair.to_b.send(b"done")
    pair.b.wait_for(lambda told: b"done" in told)
    assert [bytes_in(one) for one in places] == wanted


def test_interleaved_transfers_of_threads_both_ways(pair):
    sides = [(pair.to_b, pair.b), (pair.to_a, pair.a)]
    wanted = []
    threads = []
    for side, (link, user) in enumerate(sides):
        for transfer in range(3):
            layers = [random_rows(100 * side + transfer, 50, (2000,), 41) for _ in range(4)]
            for layer, one in enumerate(layers):
                user.expected[transfer, layer] = places = empty_like(one, 60, layer)
                wanted.append((one, places))

            def run(link: Any = link, transfer: int = transfer, layers: Any = layers) -> None:
                for layer, one in enumerate(layers):
                    for first in range(0, 41, 9):
                        part = one.part(first, 9)
                        link.send_rows(RowsSent(transfer, layer, first, len(part.blocks)), part)
                link.send(b"end of %d" % transfer)

            threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, user in sides:
        user.wait_for(lambda told: len([one for one in told if isinstance(one, bytes)]) == 3)
        for transfer in range(3):
            assert user.num_arrived(transfer) == 4 * 41
    assert all(bytes_in(one) == bytes_in(places) for one, places in wanted)


def test_unwanted_rows_are_thrown_away(pair):
    sent = random_rows(1, 200, (16384,), 200)
    send_all(pair.to_b, 1, 0, sent)
    small = random_rows(2, 3, (10,), 3)
    pair.b.expected[2, 0] = places = empty_like(small, 3)
    send_all(pair.to_b, 2, 0, small)
    pair.to_b.send(b"done")
    pair.b.wait_for(lambda told: b"done" in told)
    assert pair.b.num_arrived(1) == 0 and pair.b.num_arrived(2) == 3
    assert sum(one.num_blocks for one in pair.b.asked) == 203
    assert bytes_in(places) == bytes_in(small)


def test_frames_and_rows_stay_in_order(pair):
    """A frame comes after the rows before it, and rows after the frame before them."""
    sent = random_rows(1, 30, (70000,), 30)
    pair.b.on_frame = lambda frame: pair.b.expected.update({(int(frame), 0): empty_like(sent, 30)})
    for number in range(20):
        pair.to_b.send(b"%d" % number)
        send_all(pair.to_b, number, 0, sent)
    pair.to_b.send(b"20")
    pair.b.wait_for(lambda told: b"20" in told)
    assert pair.b.frames() == [b"%d" % number for number in range(21)]
    for number in range(20):
        told = pair.b.told[pair.b.told.index(b"%d" % number) :]
        own = [one for one in told[: told.index(b"%d" % (number + 1))] if isinstance(one, RowsSent)]
        assert {one.transfer_id for one in own} == {number}
        assert sum(one.num_blocks for one in own) == 30
        assert bytes_in(pair.b.expected[number, 0]) == bytes_in(sent)


def test_frames_of_any_size_and_many(pair):
    frames = [bytes(0), b"x", bytes(1 << 20), *(b"%d" % n for n in range(3000))]
    for frame in frames:
        pair.to_b.send(frame)
    pair.b.wait_for(lambda told: len(told) == len(frames))
    assert pair.b.told == frames
    with pytest.raises(ValueError, match="at most 1048576"):
        pair.to_b.send(bytes((1 << 20) + 1))


def test_an_answer_from_the_links_own_thread(pair):
    pair.b.on_frame = lambda frame: pair.to_a.send(frame + b"?")
    pair.a.on_frame = lambda frame: len(frame) < 50 and pair.to_b.send(frame + b"!")
    pair.to_b.send(b"hello")
    pair.a.wait_for(lambda told: told and len(told[-1]) >= 50)


def test_a_close_is_seen_by_the_other_side(pair):
    pair.to_b.send(b"last")
    pair.b.wait_for(lambda told: b"last" in told)
    pair.to_b.close()
    pair.to_b.close()
    pair.b.wait_for(lambda told: len(told) == 2)
    assert pair.b.told[1] == "the other side closed the link, or is gone"
    assert pair.to_b.join(30) and pair.to_a.join(30)
    assert pair.a.told == []  # it knows
    with pytest.raises(LinkLost, match="on this side"):
        pair.to_b.send(b"")
    sent = random_rows(1, 2, (8,), 2)
    for end in (pair.to_a, pair.to_b):
        with pytest.raises(LinkLost):
            send_all(end, 1, 0, sent)


def test_nothing_is_written_after_close(pair):
    """Rows are on their way as the receiver closes, at another moment each time."""
    sent = random_rows(1, 64, (1 << 18,), 64)
    pair.b.expected[1, 0] = places = empty_like(sent, 64)

    def send() -> None:
        with suppress(LinkLost):
            for _ in range(1000):
                send_all(pair.to_b, 1, 0, sent)

    thread = threading.Thread(target=send)
    thread.start()
    wait_until(lambda: places.arrays[0].any())
    pair.to_a.close()
    before = places.arrays[0].copy()
    thread.join(30)
    assert not thread.is_alive()
    assert pair.to_a.join(30)
    assert np.array_equal(before, places.arrays[0])


def test_close_from_a_callback(pair):
    pair.b.on_frame = lambda frame: pair.to_a.close()
    pair.to_b.send(b"go")
    pair.a.wait_for(lambda told: told)
    assert pair.to_a.join(30)
    assert pair.b.told == [b"go"]


def test_another_size_is_no_rows(pair):
    pair.b.expected[1, 0] = empty_like(random_rows(1, 4, (60,), 4), 4)
    with suppress(LinkLost):  # which may be seen while it is sent
        send_all(pair.to_b, 1, 0, random_rows(1, 4, (64,), 4))
    pair.b.wait_for(lambda told: told)
    assert "256 bytes as 4 blocks, and here 4 blocks of 60 bytes" in pair.b.told[0]
    pair.a.wait_for(lambda told: told)


def test_places_outside_the_arena_lose_the_link_and_write_nothing(pair):
    arena = np.zeros((4, 64), np.uint8)
    pair.b.expected[1, 0] = BlockRows([arena], blocks_of(1, 2, -1, 3))
    with suppress(LinkLost):  # which may be seen while it is sent
        send_all(pair.to_b, 1, 0, random_rows(1, 4, (64,), 4))
    pair.b.wait_for(lambda told: told)
    assert "block" in pair.b.told[0] and not arena.any()


def test_rows_that_are_none_are_refused_before_they_are_sent(pair):
    data = BlockRows([np.zeros((4, 64), np.uint8)], blocks_of(0, 4))
    with pytest.raises(ValueError, match="block"):
        pair.to_b.send_rows(RowsSent(1, 0, 0, 2), data)
    pair.to_b.send(b"still here")
    pair.b.wait_for(lambda told: told == [b"still here"])


def test_tcp_in_python_alone(monkeypatch):
    monkeypatch.setattr(rows_module, "HAS_NATIVE", False)
    pair = Pair("tcp://127.0.0.1:*")
    sent = random_rows(3, 300, (1000, 24), 257)
    pair.b.expected[1, 1] = places = empty_like(sent, 300)
    send_all(pair.to_b, 1, 1, sent)
    pair.to_b.send(b"done")
    pair.b.wait_for(lambda told: b"done" in told)
    assert bytes_in(places) == bytes_in(sent)
    pair.close()
