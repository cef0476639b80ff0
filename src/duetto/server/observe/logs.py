"""Where the log goes: to stderr, by a thread of its own. Knows nothing of what is logged.

A terminal that is stopped, or a pipe that nobody reads, blocks whoever writes to it: that must not
be the event loop. Lines beyond what the thread's queue holds are dropped and counted.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MAX_LINES = 10_000  # that wait to be written
FLUSH_S = 1.0  # for the last of them, at the end


Records = SimpleQueue[logging.LogRecord | None]  # `put` may be interrupted by a signal that logs


class _Queued(logging.Handler):
    """Never waits and formats nothing: the thread that writes does, so what is logged must not
    change afterwards."""

    def __init__(self, records: Records) -> None:
        super().__init__()
        self._records = records
        self._num_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._records.qsize() >= MAX_LINES:
            self._num_lost += 1
            return
        if self._num_lost:
            lost = "%d lines before the next one are lost: nobody read them"
            name, level, args = record.name, logging.WARNING, (self._num_lost,)
            self._records.put(logging.LogRecord(name, level, "", 0, lost, args, None))
            self._num_lost = 0
        self._records.put(record)


@contextmanager
def logged(level: str, stream: TextIO | None = None) -> Iterator[None]:
    """Write what `duetto` and uvicorn log from `level` on to stderr, until the end of the block.

    uvicorn's own news (started, listening) is for `debug`: `serve` has said it already.
    """
    records: Records = SimpleQueue()
    handler = _Queued(records)
    threshold = getattr(logging, level.upper())
    loggers = {
        "duetto": threshold,
        "uvicorn.error": threshold if level == "debug" else max(threshold, logging.WARNING),
    }
    before = {name: logging.getLogger(name).level for name in loggers}
    writer = Thread(
        target=_write, args=(records, stream or sys.stderr), name="duetto-log", daemon=True
    )
    writer.start()
    for name, own in loggers.items():
        logging.getLogger(name).setLevel(own)
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name, was in before.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(was)
        records.put(None)
        writer.join(FLUSH_S)  # but wait for no reader that never comes


def _write(records: Records, stream: TextIO) -> None:
    """Whatever waits goes out in one write."""
    formatter = logging.Formatter(FORMAT)
    is_last = False
    while not is_last:
        waiting = [records.get()]
        while not records.empty():
            waiting.append(records.get())
        is_last = waiting[-1] is None
        try:
            stream.write("".join([_line(formatter, r) for r in waiting if r is not None]))
            stream.flush()
        except (OSError, ValueError):  # nobody can read it any more
            pass


def _line(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    try:
        return formatter.format(record) + "\n"
    except Exception as error:  # a wrong call of the logger must not end the log
        return f"a line of the log is lost: {record.msg!r}: {type(error).__name__}\n"
