"""What the HTTP wire needs and uvicorn does not have. Knows no paths and no bodies.

Limits: the size and the time of a request's head and trailers, and the time for which a client may
take nothing of a reply. HTTP/1.0: replies that its clients can read.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class BoundedHttp(HttpToolsProtocol):
    """Ends a connection that sends its head too slowly or at too great a length, or reads nothing.

    uvicorn makes one per connection; the limits are class attributes because nothing else of ours
    reaches its constructor.
    """

    max_headers: ClassVar[int] = 100
    max_head_bytes: ClassVar[int] = 64 * 1024  # request line and headers; trailers
    head_timeout_s: ClassVar[float] = 10.0  # also for the rest of a body that nobody reads
    write_timeout_s: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0  # since a head was complete or a body grew
        self._head_timer: asyncio.TimerHandle | None = None  # runs while a head is expected
        self._write_timer: asyncio.TimerHandle | None = None  # runs while the client takes nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers(head=True, write=True)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._num_head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        if self._num_head_bytes > self.max_head_bytes:
            self.cut()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes = 0
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= self.max_headers:
            # The parser makes its own exception of it, which uvicorn answers with 400.
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the head will come again
        self._num_head_bytes = 0
        self._cancel_timers(head=True)
        is_old = self.parser.get_http_version() == "1.0"
        if is_old:
            self.expect_100_continue = False  # such a client knows no interim reply
        super().on_headers_complete()
        if is_old:  # the application has not been called yet, it is a task that has to be started
            self.cycle.send = _unchunked(self.cycle)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._num_head_bytes = 0
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._expect_head()  # or its connection would be held as long as a byte now and then

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.cut()  # two replies would be read as one
                return
            self._disconnect_cycle()
        super().send_400_response(msg)

    def cut(self) -> None:
        """End the connection at once; whoever makes a reply learns that the client has gone."""
        self._disconnect_cycle()
        # Aborted, not closed: closing would wait for the client to take what is buffered.
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.cut)

    def resume_writing(self) -> None:
        self._cancel_timers(write=True)
        super().resume_writing()

    def _decline_upgrade(self, rest: bytes) -> None:
        """HTTP/1.1 lets a server ignore `Upgrade`, but the parser takes the body for the upgraded.

        So the head is read again without what asks for it.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":  # an upgrade by its name
            self.send_400_response("CONNECT is not supported.")
            return
        asking = (b"connection", b"upgrade", b"http2-settings")
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in asking]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _disconnect_cycle(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.cut)

    def _cancel_timers(self, *, head: bool = False, write: bool = False) -> None:
        if head and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if write and self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _unchunked(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """How to reply to a client of HTTP/1.0, which would read chunk sizes as text (RFC 9112, 6.1).

    A reply without a Content-Length ends where its connection does; uvicorn closes each of 1.0.
    """
    has_length = True

    async def send(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            has_length = b"content-length" in names
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, message)

    return send
