"""Where the log goes: to a stream, without ever waiting for its reader."""

import io
import logging
import threading
import time

from duetto.server.observe import logs
from duetto.server.observe.logs import logged


def test_lines_arrive_with_their_level_and_the_handlers_go():
    stream = io.StringIO()
    before = list(logging.getLogger("duetto").handlers)
    with logged("info", stream):
        logging.getLogger("duetto.server").info("one")
        logging.getLogger("duetto.server").debug("hidden")
        logging.getLogger("uvicorn.error").info("hidden")
        logging.getLogger("uvicorn.error").warning("two")
    first, second = stream.getvalue().splitlines()
    assert first.endswith(" INFO one") and second.endswith(" WARNING two")
    assert logging.getLogger("duetto").handlers == before


def test_debug_has_uvicorns_own():
    stream = io.StringIO()
    with logged("debug", stream):
        logging.getLogger("uvicorn.error").debug("seen")
    assert "DEBUG seen" in stream.getvalue()


def test_a_reader_that_reads_nothing_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(logs, "FLUSH_S", 0.05)
    is_read = threading.Event()
    stream = io.StringIO()
    monkeypatch.setattr(stream, "flush", lambda: is_read.wait(30))
    start = time.monotonic()
    try:
        with logged("info", stream):
            for _ in range(200):
                logging.getLogger("duetto").info("a line")
        assert time.monotonic() - start < 15
    finally:
        is_read.set()


def test_lost_lines_are_counted(monkeypatch):
    records = logs.Records()
    handler = logs._Queued(records)
    monkeypatch.setattr(logs, "MAX_LINES", 1)
    for number in range(4):
        handler.handle(logging.LogRecord("duetto", logging.INFO, "", 0, str(number), (), None))
    assert records.get().getMessage() == "0"
    handler.handle(logging.LogRecord("duetto", logging.INFO, "", 0, "4", (), None))
    assert records.get().getMessage().startswith("3 lines before the next one are lost")
    assert records.get().getMessage() == "4"


def test_a_wrong_call_does_not_end_the_log():
    wrong = logging.LogRecord("duetto", logging.INFO, "", 0, "%d", ("no number",), None)
    assert "is lost" in logs._line(logging.Formatter(logs.FORMAT), wrong)
