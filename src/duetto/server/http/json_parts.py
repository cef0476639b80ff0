"""Large replies: encoded in parts, and sent as fast as the client takes them.

A part is made in about a millisecond, so that whoever else wants the interpreter gets it. Knows no
shapes of replies.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

NUM_AT_ONCE = 64  # rows of up to NUM_IN_ROW candidates
NUM_IN_ROW = 21
NUM_PLAIN_AT_ONCE = 8192  # items that are numbers or strings
WRITE_BYTES = 64 * 1024  # what is handed to the transport at a time
LEAST_RATE = 64 * 1024  # bytes a second at which a client must take a reply ...
GRACE_S = 60.0  # ... beside this

Json = dict[str, Any]  # an object


class JsonRows:
    """A list that is made a few rows at a time, while it is written.

    All of it at once would be hundreds of bytes for each number in it.
    """

    def __init__(
        self, num_rows: int, make: Callable[[int, int], list[Any]], num_at_once: int = NUM_AT_ONCE
    ) -> None:
        """`make(start, end)` gives these rows; it is called in order, on any thread, and once."""
        self._num_rows = num_rows
        self._make = make
        self._num_at_once = num_at_once

    def parts(self) -> Iterator[bytes]:
        yield b"["
        pieces = (
            msgspec.json.encode(self._make(*at))[1:-1]
            for at in _slices(self._num_rows, self._num_at_once)
        )
        yield from _joined(pieces)
        yield b"]"


class JsonColumns:
    """An object of lists that is made a few rows at a time, as Rows are."""

    def __init__(
        self,
        num_rows: int,
        make: Callable[[int, int], Mapping[str, list[Any]]],
        num_at_once: int = NUM_AT_ONCE,
    ) -> None:
        self._num_rows = num_rows
        self._make = make
        self._num_at_once = num_at_once

    def parts(self) -> Iterator[bytes]:
        columns: dict[str, list[bytes]] = {}
        for at in _slices(self._num_rows, self._num_at_once):
            for name, values in self._make(*at).items():
                columns.setdefault(name, []).append(msgspec.json.encode(values)[1:-1])
        yield b"{"
        for place, (name, pieces) in enumerate(columns.items()):
            yield (b"," if place else b"") + msgspec.json.encode(name) + b":["
            yield from _joined(pieces)
            yield b"]"
        yield b"}"


class EncodedParts:
    """What is encoded once, and may stand in several places of a reply."""

    def __init__(self, value: Any) -> None:
        self.shared = packed(json_parts(value))


def encode(value: Any) -> bytes:
    """The JSON of what json_parts takes, in one piece: for what is small."""
    return msgspec.json.encode(value, enc_hook=_raw)


def _raw(value: Any) -> msgspec.Raw:
    if isinstance(value, JsonRows | JsonColumns | EncodedParts):
        return msgspec.Raw(b"".join(json_parts(value)))
    raise NotImplementedError(type(value).__name__)  # a bug: nothing else is in a reply


def json_parts(value: Any) -> Iterator[bytes]:
    """The JSON of plain data, in parts. Rows, Columns and EncodedParts may be items of objects."""
    match value:
        case JsonRows() | JsonColumns():
            yield from value.parts()
        case EncodedParts():
            yield from value.shared
        case dict():
            yield b"{"
            for place, (key, item) in enumerate(value.items()):
                yield (b"," if place else b"") + msgspec.json.encode(key) + b":"
                yield from json_parts(item)
            yield b"}"
        case list() | tuple() if value and isinstance(value[0], dict):
            yield b"["
            for place, item in enumerate(value):
                if place:
                    yield b","
                yield from json_parts(item)
            yield b"]"
        case list() | tuple():
            yield b"["
            starts = range(0, len(value), NUM_PLAIN_AT_ONCE)
            slices = (value[start : start + NUM_PLAIN_AT_ONCE] for start in starts)
            yield from _joined(msgspec.json.encode(items)[1:-1] for items in slices)
            yield b"]"
        case _:
            yield msgspec.json.encode(value)


def packed(parts: Iterator[bytes]) -> list[bytes]:
    """The same bytes in parts of about WRITE_BYTES. One that is longer is kept, not copied."""
    done: list[bytes] = []
    waiting: list[bytes] = []
    num_waiting = 0
    for part in parts:
        waiting.append(part)
        num_waiting += len(part)
        if num_waiting >= WRITE_BYTES:
            is_long = len(part) >= WRITE_BYTES
            done.append(b"".join(waiting[:-1] if is_long else waiting))
            done += [part] if is_long else []
            waiting, num_waiting = [], 0
    done.append(b"".join(waiting))
    return [part for part in done if part]


class PartsResponse(Response):
    """A JSON reply that is sent in parts; a client that takes it too slowly is cut off."""

    media_type = "application/json"

    def __init__(self, parts: list[bytes], on_end: Callable[[], None] = lambda: None) -> None:
        """`on_end` is called once the reply has been taken, or never will be."""
        super().__init__()
        self._parts = parts
        self.on_end = on_end
        self._num_bytes = sum(map(len, parts))
        self.headers["content-length"] = str(self._num_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with asyncio.timeout(GRACE_S + self._num_bytes / LEAST_RATE):
                await send(start)
                for place, part in enumerate(self._parts):
                    self._parts[place] = b""  # what has been written is held no longer
                    for at in range(0, len(part), WRITE_BYTES):
                        body = part[at : at + WRITE_BYTES]
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.warning("a client took too little of its reply in time, and is cut off")
        finally:
            self.on_end()


def rows_at_once(num_in_row: int) -> int:
    """How many rows of so many candidates are made in about a millisecond; at least one."""
    return max(1, NUM_AT_ONCE * NUM_IN_ROW // max(NUM_IN_ROW, num_in_row))


def _slices(num_rows: int, num_at_once: int) -> Iterator[tuple[int, int]]:
    """Where to cut; once even if there are no rows, as an object's names are in them."""
    starts = range(0, max(1, num_rows), num_at_once)
    return ((start, min(start + num_at_once, num_rows)) for start in starts)


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for place, piece in enumerate(piece for piece in pieces if piece):
        if place:
            yield b","
        yield piece
