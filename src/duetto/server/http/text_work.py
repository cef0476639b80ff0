"""Work on texts and replies, off the event loop: small before large, and a bounded number of bytes.

Knows no tokenizer and no HTTP. A text that waits is ordered by when it came and by its size, so a
large one lets small ones pass for a while and is never passed for ever. At most one large text is
worked on at a time, so that there is always a thread for a small one.
"""

import asyncio
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import PriorityQueue
from time import monotonic
from typing import Any, TypeVar

from duetto.server.http.byte_budget import ByteBudget

T = TypeVar("T")

INLINE_BYTES = 4096  # work on so little is done at once; a thread would cost more
LARGE_BYTES = 64 * 1024  # takes about 20 ms to tokenize
LARGE_REPLY_BYTES = 2**21
LETS_PASS_S_PER_BYTE = 1e-5  # so 2 MB let pass what is small and comes within 20 s
NUM_SMALL_THREADS = 2
NUM_CHAT_THREADS = 4  # they wait for the processes that templates run in, of which there are 4
# A step waits for the slowest of its threads, so a text must not take a core from it for long. Not
# more, as a thread that is seldom run may be holding the interpreter.
LARGE_NICENESS = 5


@dataclass(order=True, slots=True)
class _Item:
    due: float  # earlier first
    number: int  # of equals, the first to come
    work: Callable[[], Any] | None = field(compare=False)  # None ends a thread
    future: "Future[Any]" = field(compare=False)


class _Lane:
    """A queue with threads of its own, which start when there is something to do."""

    def __init__(self, name: str, num_threads: int, niceness: int = 0) -> None:
        self._queue: PriorityQueue[_Item] = PriorityQueue()
        self._numbers = itertools.count()
        # Daemons: what a native library computes cannot be interrupted, and must hold no exit up.
        self._threads = [
            threading.Thread(target=self._run, name=f"duetto-{name}", daemon=True)
            for _ in range(num_threads)
        ]
        self._niceness = niceness
        self._has_started = False

    def put(self, work: Callable[[], T], due: float) -> "Future[T]":
        if not self._has_started:
            self._has_started = True
            for thread in self._threads:
                thread.start()
        future: Future[T] = Future()
        self._queue.put(_Item(due, next(self._numbers), work, future))
        return future

    def stop(self) -> None:
        for _ in self._threads if self._has_started else ():
            self._queue.put(_Item(float("-inf"), next(self._numbers), None, Future()))

    def _run(self) -> None:
        if self._niceness and sys.platform == "linux":  # where threads have a niceness of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while True:
            item = self._queue.get()
            if item.work is None:
                return
            if item.future.set_running_or_notify_cancel():  # or nobody waits for it any more
                try:
                    item.future.set_result(item.work())
                except BaseException as error:  # a panic of a native library is not an Exception
                    item.future.set_exception(error)
            del item  # or the last text would be kept until the next one comes


class TextWork:
    """Belongs to one event loop; the work itself runs on any thread."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = monotonic) -> None:
        """`max_bytes` of large bodies may be held at a time."""
        self._clock = clock
        self.bodies = ByteBudget(max_bytes, LARGE_BYTES, "large requests are being read")
        self._bodies = _Lane("body", 1)  # a parser holds the interpreter, so two were no faster
        self._small = _Lane("text", NUM_SMALL_THREADS)
        self._chats = _Lane("chat", NUM_CHAT_THREADS)
        self._large = _Lane("large-text", 1, LARGE_NICENESS)
        self._replies = _Lane("reply", 1)
        self._large_replies = _Lane("large-reply", 1)

    async def read(self, work: Callable[[], T], num_bytes: int) -> T:
        """Work on JSON, which takes milliseconds where a tokenizer takes seconds."""
        if num_bytes <= LARGE_BYTES:
            return work()
        return await self._wait(self._bodies, work, num_bytes)

    async def text(self, work: Callable[[], T], num_bytes: int, *, at_once: bool = True) -> T:
        """Work on a text, in its turn; a short one `at_once`, unless it may take long anyway."""
        if num_bytes <= INLINE_BYTES and at_once:
            return work()
        lane = self._small if num_bytes <= LARGE_BYTES else self._large
        return await self._wait(lane, work, num_bytes)

    async def chat(self, work: Callable[[], T], num_bytes: int) -> T:
        """Work with a template: a program, which may take its time, and never runs at once."""
        lane = self._chats if num_bytes <= LARGE_BYTES else self._large
        return await self._wait(lane, work, num_bytes)

    async def reply(self, work: Callable[[], T], num_bytes: int) -> T:
        """Make a reply of about `num_bytes`, in its turn."""
        if num_bytes <= LARGE_BYTES:
            return work()
        lane = self._replies if num_bytes <= LARGE_REPLY_BYTES else self._large_replies
        return await self._wait(lane, work, num_bytes)

    def stop(self) -> None:
        """End the threads once they have done what they are at."""
        texts = (self._bodies, self._small, self._chats, self._large)
        for lane in (*texts, self._replies, self._large_replies):
            lane.stop()

    async def _wait(self, lane: _Lane, work: Callable[[], T], num_bytes: int) -> T:
        due = self._clock() + LETS_PASS_S_PER_BYTE * num_bytes
        return await asyncio.wrap_future(lane.put(work, due))
