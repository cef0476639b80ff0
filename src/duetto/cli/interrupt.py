"""Ctrl-C: what is under way ends in order and what is known is kept, or all ends at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # 128 + SIGINT, the exit code that shells have for it
_SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar has hidden it


@contextmanager
def first_interrupt() -> Iterator[Callable[[], bool]]:
    """While it lasts the first Ctrl-C only sets a mark, which the function given here tells; a
    second raises KeyboardInterrupt, as ever.

    So nothing is torn apart in the middle of a step. Outside the main thread there is no mark.
    """
    is_marked = False

    def mark(_number: int, _frame: object) -> None:
        nonlocal is_marked
        if is_marked:
            raise KeyboardInterrupt
        is_marked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, mark)
    try:
        yield lambda: is_marked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def end_at_once(last_words: Callable[[], None]) -> Iterator[None]:
    """While it lasts Ctrl-C ends the process there and then, also in the middle of native code,
    which Python would let come to its end first. Another thread says the `last_words`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_wait_for_interrupt, args=(reader, last_words), daemon=True)
    thread.start()
    # Without a handler Python would not write to the pipe; this one leaves all to the thread.
    handler = signal.signal(signal.SIGINT, lambda _number, _frame: None)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, handler)
        os.close(writer)


def _wait_for_interrupt(reader: int, last_words: Callable[[], None]) -> None:
    """Python writes the number of each signal there as it comes; the end is that of the context."""
    while numbers := os.read(reader, 64):
        if signal.SIGINT in numbers:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SHOW_CURSOR)
            try:
                last_words()
                sys.stdout.flush()
            finally:
                os._exit(INTERRUPTED)
    os.close(reader)
