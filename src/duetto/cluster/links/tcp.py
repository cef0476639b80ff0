"""KV links over TCP: several connections for rows, so that one window, or one lost packet, does not
hold up all. Rows go from the arena to the socket, and from a socket to the arena, without copies in
these processes; through TLS they are copied, as they are encrypted."""

import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from duetto.cluster.address import WireAddress, in_use
from duetto.cluster.links.carriers import Carrier, TCPCarrier, TLSCarrier
from duetto.cluster.links.channel import LinkChannel, PlainChannel, TLSChannel
from duetto.cluster.links.link import LinkLost
from duetto.core.errors import ConfigError

NUM_STREAMS = 2
BUFFER_BYTES = 4 << 20  # of each socket, if the system lets us
LINK_FLAG = "--kv-link"


@dataclass(frozen=True, slots=True)
class LinkTLS:
    """Both sides show a certificate that `authority` has signed."""

    certificate: Path
    key: Path
    authority: Path

    def context(self, *, listens: bool) -> ssl.SSLContext:
        """Raises ConfigError for files that are none of these."""
        protocol = ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # who is signed by the cluster's authority is of the cluster
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{LINK_FLAG}: TLS by {self.certificate}, {self.key} and {self.authority}: "
                f"{error.strerror or error}; PEM files of a certificate, its key and its authority "
                f"are accepted"
            ) from None
        return context


class TCPMedium:
    """One address, to listen at or to call."""

    def __init__(
        self,
        address: WireAddress,
        tls: LinkTLS | None = None,
        *,
        listens: bool,
        num_streams: int = NUM_STREAMS,
    ) -> None:
        self._address = address
        self._tls = None if tls is None else tls.context(listens=listens)
        self._num_streams = num_streams

    @property
    def num_carriers(self) -> int:
        return self._num_streams

    def listen(self) -> tuple[socket.socket, str]:
        own = self._address
        family = socket.AF_INET6 if ":" in own.host else socket.AF_INET
        wire = socket.socket(family, socket.SOCK_STREAM)
        try:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _enlarge(wire)  # those that are accepted have it from here
            wire.bind((own.host, own.port))
            wire.listen(64)
        except OSError as error:
            wire.close()
            if isinstance(error, socket.gaierror) or own.port == 0:
                raise ConfigError(f"{LINK_FLAG} {own}: {error.strerror or error}") from None
            raise in_use(own, LINK_FLAG) from None
        return wire, str(own._replace(port=wire.getsockname()[1]))

    def tidy(self) -> None:
        """Nothing lies anywhere."""

    def connect(self, timeout_s: float) -> socket.socket:
        try:
            found = socket.getaddrinfo(
                self._address.host, self._address.port, type=socket.SOCK_STREAM
            )
        except socket.gaierror as error:
            raise LinkLost(f"{self._address}: {error.strerror}") from None
        family, kind, protocol, _, place = found[0]
        wire = socket.socket(family, kind, protocol)
        try:
            wire.settimeout(timeout_s)
            _enlarge(wire)  # before the window is agreed upon
            wire.connect(place)
            _tune(wire)
            return wire if self._tls is None else self._tls.wrap_socket(wire)
        except ssl.SSLError as error:
            wire.close()
            raise LinkLost(f"{self._address}: TLS: {error.reason or error}") from None
        except OSError as error:
            wire.close()
            if isinstance(error, TimeoutError):
                raise
            raise LinkLost(f"{self._address}: {error.strerror or error}") from None

    def accepted(self, wire: socket.socket) -> socket.socket:
        _tune(wire)
        return wire if self._tls is None else self._tls.wrap_socket(wire, server_side=True)

    def channel(self, wire: socket.socket) -> LinkChannel:
        return TLSChannel(wire) if isinstance(wire, ssl.SSLSocket) else PlainChannel(wire)

    def carrier(self, wire: socket.socket, dead_after_s: float) -> Carrier:
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of what was sent and is not acknowledged
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(dead_after_s * 1000))
        if isinstance(wire, ssl.SSLSocket):
            return TLSCarrier(TLSChannel(wire), dead_after_s)
        return TCPCarrier(wire, dead_after_s)


def _enlarge(wire: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with suppress(OSError):
            wire.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _tune(wire: socket.socket) -> None:
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
