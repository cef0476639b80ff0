import threading

import pytest
from link_world import World, bytes_in, empty_like, random_rows, send_all

from duetto.cluster.links.link import LinkLost, RowsSent
from duetto.cluster.links.pair import link_pair


def test_rows_and_frames_in_order():
    a, b = World(), World()
    to_b, to_a = link_pair(a, b)
    sent = random_rows(1, 9, (48, 7), 5)
    b.expected[3, 0] = places = empty_like(sent, 6)
    send_all(to_b, 3, 0, sent)
    send_all(to_b, 4, 0, sent)  # nobody wants it
    to_b.send(b"done")
    b.wait_for(lambda told: b"done" in told)
    assert b.told == [RowsSent(3, 0, 0, 5), b"done"]
    assert bytes_in(places) == bytes_in(sent)
    to_a.send(b"thanks")
    a.wait_for(lambda told: b"thanks" in told)
    to_b.close()
    b.wait_for(lambda told: isinstance(told[-1], str))
    assert a.reasons() == []
    assert b.told[-1].startswith("the other side closed")
    assert to_b.join(30) and to_a.join(30)
    with pytest.raises(LinkLost, match="on this side"):
        to_b.send(b"")
    with pytest.raises(LinkLost, match="the other side"):
        to_a.send(b"")


def test_what_was_sent_before_a_close_comes():
    a, b = World(), World()
    to_b, to_a = link_pair(a, b)
    to_a.stop()
    for number in range(5):
        to_b.send(b"%d" % number)
    to_b.close()
    to_a.go_on()
    b.wait_for(lambda told: len(told) == 6)
    assert b.frames() == [b"0", b"1", b"2", b"3", b"4"]


def test_nothing_is_written_after_close():
    a, b = World(), World()
    to_b, to_a = link_pair(a, b)
    sent = random_rows(1, 4, (64,), 4)
    b.expected[1, 0] = places = empty_like(sent, 4)
    to_a.stop()
    send_all(to_b, 1, 0, sent)
    to_a.close()
    to_a.go_on()
    assert to_a.join(30)
    assert not places.arrays[0].any() and b.told == []


def test_lost_on_purpose():
    a, b = World(), World()
    to_b, to_a = link_pair(a, b)
    to_b.lose("the cable", half=True)
    a.wait_for(lambda told: told == ["the cable"])
    assert to_b.join(30) and b.told == []
    to_a.send(b"into nothing")
    to_a.lose("silent")
    b.wait_for(lambda told: told == ["silent"])
    assert to_a.join(30)
    assert a.told == ["the cable"]


def test_another_size_is_no_rows():
    a, b = World(), World()
    to_b, _ = link_pair(a, b)
    b.expected[1, 0] = empty_like(random_rows(1, 4, (60,), 4), 4)
    send_all(to_b, 1, 0, random_rows(1, 4, (64,), 4))
    b.wait_for(lambda told: told)
    assert "256 bytes as 4 blocks, and here 4 blocks of 60 bytes" in b.told[0]
    a.wait_for(lambda told: told)


def test_a_user_that_fails_loses_its_link():
    a, b = World(), World()
    to_b, _ = link_pair(a, b)

    def fail(frame: bytes) -> None:
        raise RuntimeError(f"planted by {frame!r}")

    b.on_frame = fail
    to_b.send(b"x")
    b.wait_for(lambda told: len(told) == 2)
    assert "planted" in b.told[1]
    a.wait_for(lambda told: told)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    for thread in threading.enumerate():
        if thread.name == "duetto-link":
            thread.join(30)
            assert not thread.is_alive()
