"""What is worked on off the event loop, in which order, and how much of it may wait."""

import asyncio
import threading

import pytest

from duetto.server.http.text_work import LARGE_BYTES, LETS_PASS_S_PER_BYTE, TextWork


def with_work(story, **more):
    work = TextWork(max_bytes=1000, **more)
    try:
        return asyncio.run(story(work))
    finally:
        work.stop()


def name():
    return threading.current_thread().name


@pytest.mark.parametrize(
    ("size", "thread"),
    [
        (100, "MainThread"),
        (10_000, "duetto-text"),
        (LARGE_BYTES, "duetto-text"),
        (LARGE_BYTES + 1, "duetto-large-text"),
    ],
)
def test_a_text_of_some_size_is_worked_on_by_its_own_thread(size, thread):
    assert with_work(lambda work: work.text(name, size)) == thread


def test_what_may_take_long_leaves_the_event_loop_however_small():
    assert with_work(lambda work: work.text(name, 10, at_once=False)) == "duetto-text"
    assert with_work(lambda work: work.chat(name, 10)) == "duetto-chat"
    assert with_work(lambda work: work.chat(name, LARGE_BYTES + 1)) == "duetto-large-text"
    assert with_work(lambda work: work.read(name, LARGE_BYTES + 1)) == "duetto-body"
    assert with_work(lambda work: work.reply(name, LARGE_BYTES + 1)) == "duetto-reply"


def test_small_texts_pass_while_large_ones_wait_and_work():
    gate = threading.Event()

    async def story(work):
        large = [asyncio.create_task(work.text(gate.wait, 2**21)) for _ in range(24)]
        await asyncio.sleep(0.01)
        assert await work.text(name, 5000) == "duetto-text"  # and the gate is still shut
        assert not any(task.done() for task in large)
        gate.set()
        await asyncio.gather(*large)

    with_work(story)


def test_the_shorter_of_two_that_wait_is_first_and_the_longer_is_not_passed_for_ever():
    now, gate, order = [0.0], threading.Event(), []
    late = LETS_PASS_S_PER_BYTE * 200_000

    async def story(work):
        busy = asyncio.create_task(work.text(gate.wait, 2**20))
        await asyncio.sleep(0.02)
        tasks = []
        for size, now[0] in ((200_000, 0.0), (100_000, 0.1), (100_000, late)):
            what = (size, now[0])
            tasks.append(asyncio.create_task(work.text(lambda what=what: order.append(what), size)))
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(busy, *tasks)

    with_work(story, clock=lambda: now[0])
    assert order == [(100_000, 0.1), (200_000, 0.0), (100_000, late)]


def test_what_waits_and_is_cancelled_is_never_done():
    gate, done = threading.Event(), []

    async def story(work):
        first = asyncio.create_task(work.text(gate.wait, 2**20))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(work.text(lambda: done.append(1), 2**20))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait({second})
        await asyncio.sleep(0)  # asyncio tells the thread's side of the future in its next turn
        gate.set()
        await first
        return await work.text(name, 2**20)

    assert with_work(story) == "duetto-large-text"
    assert not done


def test_an_error_belongs_to_who_asked_and_the_thread_goes_on():
    def fail():
        raise KeyError("x")

    async def story(work):
        with pytest.raises(KeyError):
            await work.text(fail, 2**20)
        return await work.text(name, 2**20)

    assert with_work(story) == "duetto-large-text"
