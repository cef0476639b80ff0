"""Limits on the HTTP wire that uvicorn does not have: the size and the time of a request's head,
and the time for which a client may take nothing of a reply. Knows no paths and no bodies.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class BoundedHttp(HttpToolsProtocol):
    """Ends a connection that sends its head too slowly or at too great a length, or reads nothing.

    uvicorn makes one per connection; the limits are class attributes because nothing else of ours
    reaches its constructor.
    """

    max_headers: ClassVar[int] = 100
    max_head_bytes: ClassVar[int] = 64 * 1024  # request line and headers
    head_timeout_s: ClassVar[float] = 10.0
    write_timeout_s: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None  # runs while a head is expected
        self._write_timer: asyncio.TimerHandle | None = None  # runs while the client takes nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers(head=True, write=True)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:  # all of it belonged to a head that goes on
            self._num_head_bytes += len(data)
            if self._num_head_bytes > self.max_head_bytes:
                self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= self.max_headers:
            # The parser makes its own exception of it, which uvicorn answers with 400.
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._cancel_timers(head=True)
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Aborted, not closed: closing would wait for the client to take what is buffered.
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_timers(write=True)
        super().resume_writing()

    def _expect_head(self) -> None:
        self._num_head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _cancel_timers(self, *, head: bool = False, write: bool = False) -> None:
        if head and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if write and self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
