"""Work for a client that may leave before it is done."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What has been read and waits in a queue is given up if its client leaves."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)  # most of it is done at once
    if not task.done():
        leaving = asyncio.ensure_future(request.receive())  # the body has ended: nothing else comes
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
        finally:
            leaving.cancel()
            task.cancel()
    return task.result()
