"""The reading of a request's body: within its limits of bytes, of time, and of structure.

Knows no fields. What a body is made of is counted before a parser sees it: a million empty lists
are four megabytes, and a second of the garbage collector's time.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from duetto.server.http.errors import ApiError, invalid
from duetto.server.http.query import query_of
from duetto.server.http.text_work import TextWork
from duetto.server.settings import ServerSettings

MAX_CONTAINERS = 40_000  # lists and objects: 5000 messages have 20,000 with parts and tools
MAX_STRINGS = 400_000  # keys count: a bias for each token of the largest vocabularies
MAX_VALUES = 2**19  # items of lists and objects: a parser holds the interpreter for 20 ms
_BACKSLASH, _QUOTE, _COMMA = b"\\", b'"', b","


@asynccontextmanager
async def body_of(
    request: Request, settings: ServerSettings, work: TextWork
) -> AsyncIterator[bytes]:
    """The body, if it comes in time and within the limit; counted as held until the block ends.

    Raises ApiError 400 for query parameters, 413, 408, or 503 where too many large bodies are held
    already.
    """
    query_of(request)  # which holds nothing that a body could
    most = settings.max_body_bytes
    too_large = ApiError(413, f"the body exceeds {most} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > most:
        raise too_large
    held, chunks, num_bytes = work.bodies.hold(), [], 0
    try:
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if num_bytes > most:
                        raise too_large
                    held.add(len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            headers = {"Connection": "close"}
            raise ApiError(408, "the body did not arrive in time", headers=headers) from None
        yield b"".join(chunks)
    finally:
        held.release()


def check_structure(body: bytes) -> None:
    """Refuse what is made of more lists, objects and strings than any request needs."""
    is_plain = body.count(_QUOTE) <= 2 * MAX_STRINGS and body.count(_COMMA) < MAX_VALUES
    if is_plain and _num_containers(body) <= MAX_CONTAINERS:
        return  # which says enough, as a bracket in a text makes the count larger
    # A backslash stands in strings only, so without the escapes each quote opens or closes one.
    plain = body.replace(_BACKSLASH * 2, b"").replace(_BACKSLASH + _QUOTE, b"")
    num_strings = plain.count(_QUOTE) // 2
    if num_strings > MAX_STRINGS:
        raise invalid(None, f"the body holds {num_strings} strings; at most {MAX_STRINGS}")
    parts = plain.split(_QUOTE)[::2]
    num_values = 1 + sum(part.count(_COMMA) for part in parts)
    num_containers = sum(map(_num_containers, parts))
    for found, most, what in (
        (num_containers, MAX_CONTAINERS, "lists and objects"),
        (num_values, MAX_VALUES, "items"),
    ):
        if found > most:
            raise invalid(None, f"the body holds {found} {what}; at most {most} are accepted")


def _num_containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")
