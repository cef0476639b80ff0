"""Links made: one side listens, the other calls; whichever medium it is."""

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from threading import Lock, Thread
from time import monotonic

from duetto.cluster.links.carriers import Carrier
from duetto.cluster.links.handshake import (
    MAX_DEAD_AFTER_MS,
    PATIENCE_S,
    SESSION_BYTES,
    ConnectionKind,
    LinkHello,
    answer_link,
    call_link,
)
from duetto.cluster.links.link import LinkEnd, LinkLost, LinkUser
from duetto.cluster.links.medium import Medium
from duetto.cluster.links.streamed import Patience, StreamedEnd
from duetto.cluster.secret import ClusterSecret

logger = logging.getLogger(__name__)

# Who uses a new link; it begins once this has returned. May raise: the link is refused.
AcceptLink = Callable[[LinkEnd], LinkUser]
MAX_HANDSHAKES = 64  # at a time; more are hung up at once
DEAD_AFTER_S = 3.0


def connect_by(
    medium: Medium, user: LinkUser, secret: ClusterSecret | None, dead_after_s: float
) -> StreamedEnd:
    """A link to who listens there. Raises LinkLost."""
    own_ms = _in_ms(dead_after_s)
    with ExitStack() as until_it_stands:
        try:
            hello = LinkHello(ConnectionKind.CONTROL, medium.num_carriers, own_ms, bytes(16))
            control, theirs = _dial(medium, hello, secret)
            until_it_stands.callback(control.close)
            carriers: list[Carrier] = []
            for number in range(medium.num_carriers):
                hello = LinkHello(ConnectionKind.CARRIER, number, own_ms, theirs.session)
                wire, _ = _dial(medium, hello, secret)
                until_it_stands.callback(wire.close)
                carriers.append(medium.carrier(wire, dead_after_s))
        except TimeoutError:
            raise LinkLost("the other side does not answer") from None
        except OSError as error:
            raise LinkLost(f"the link did not come about: {error.strerror or error}") from None
        until_it_stands.pop_all()
    patience = Patience(dead_after_s, theirs.dead_after_ms / 1000)
    end = StreamedEnd(medium.channel(control), carriers, patience)
    end.start(user)
    return end


def _in_ms(dead_after_s: float) -> int:
    assert 0.001 <= dead_after_s <= MAX_DEAD_AFTER_MS / 1000, f"dead after {dead_after_s} s"
    return int(dead_after_s * 1000)


def _dial(
    medium: Medium, hello: LinkHello, secret: ClusterSecret | None
) -> tuple[socket.socket, LinkHello]:
    wire = medium.connect(PATIENCE_S)
    try:
        return wire, call_link(wire, hello, secret)
    except BaseException:
        wire.close()
        raise


@dataclass
class _Coming:
    """A link whose carriers are not all here yet."""

    control: socket.socket
    num_carriers: int
    patience: Patience
    since: float = field(default_factory=monotonic)
    carriers: dict[int, Carrier] = field(default_factory=dict)

    def close(self) -> None:
        self.control.close()
        for carrier in self.carriers.values():
            carrier.close()


class LinkListener:
    """Takes calls until it is closed; links that stand live on."""

    def __init__(
        self,
        medium: Medium,
        accept: AcceptLink,
        secret: ClusterSecret | None,
        dead_after_s: float,
    ) -> None:
        """Raises ConfigError for an address that cannot be listened at."""
        self._medium, self._accept, self._secret = medium, accept, secret
        self._dead_after_s = dead_after_s
        self._socket, self.address = medium.listen()
        self._lock = Lock()
        self._coming: dict[bytes, _Coming] = {}
        self._num_handshakes = 0
        self._is_closed = False
        self._thread = Thread(target=self._run, name="duetto-link-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No new links. Safe to call twice."""
        self._is_closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            try:
                wire, _ = self._socket.accept()
            except OSError as error:
                if not self._is_closed:
                    logger.warning("KV links: %s", error)
                    threading.Event().wait(0.1)  # no more files, say
                continue
            wire.settimeout(PATIENCE_S)
            with self._lock:
                is_too_many = self._num_handshakes >= MAX_HANDSHAKES
                self._num_handshakes += not is_too_many
            if is_too_many:
                wire.close()
                continue
            Thread(target=self._greet, args=(wire,), name="duetto-link-hello", daemon=True).start()
        self._socket.close()
        self._medium.tidy()
        with self._lock:
            coming, self._coming = self._coming, {}
        for one in coming.values():
            one.close()

    def _greet(self, raw: socket.socket) -> None:
        wire = raw
        try:
            wire = self._medium.accepted(raw)
            wire.settimeout(PATIENCE_S)
            own_ms = _in_ms(self._dead_after_s)
            hello = answer_link(wire, own_ms, self._secret, lambda it: self._expect(it, wire))
            if hello.kind is ConnectionKind.CARRIER:
                self._add(hello, wire)
        except (LinkLost, OSError) as error:
            logger.warning("KV link refused at %s: %s", self.address, error)
            wire.close()
        finally:
            with self._lock:
                self._num_handshakes -= 1

    def _expect(self, hello: LinkHello, control: socket.socket) -> None:
        if hello.kind is not ConnectionKind.CONTROL:
            return
        with self._lock:
            late = [
                name
                for name, one in self._coming.items()
                if monotonic() - one.since > PATIENCE_S * (one.num_carriers + 1)
            ]
            for name in late:
                self._coming.pop(name).close()
            if self._is_closed or len(self._coming) >= MAX_HANDSHAKES:
                raise LinkLost("too many links are being made, or this side is closing")
            assert len(hello.session) == SESSION_BYTES
            self._coming[hello.session] = _Coming(
                control, hello.number, Patience(self._dead_after_s, hello.dead_after_ms / 1000)
            )

    def _add(self, hello: LinkHello, wire: socket.socket) -> None:
        with self._lock:
            coming = self._coming.get(hello.session)
            if coming is None or not hello.number < coming.num_carriers:
                raise LinkLost("a carrier of no link that is being made")
        carrier = self._medium.carrier(wire, self._dead_after_s)
        with self._lock:
            is_new = hello.number not in coming.carriers
            if not is_new or self._coming.get(hello.session) is not coming:
                carrier.close()
                raise LinkLost("a carrier of no link that is being made")
            coming.carriers[hello.number] = carrier
            if len(coming.carriers) < coming.num_carriers:
                return
            del self._coming[hello.session]
        self._begin(coming)

    def _begin(self, coming: _Coming) -> None:
        carriers = [coming.carriers[number] for number in range(coming.num_carriers)]
        channel = self._medium.channel(coming.control)
        end = StreamedEnd(channel, carriers, coming.patience)
        try:
            user = self._accept(end)
        except Exception as error:
            logger.warning("KV link refused at %s: %s", self.address, error)
            end.abandon()
        else:
            end.start(user)
