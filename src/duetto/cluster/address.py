"""Addresses of sockets: what may be written, and what may be used without a secret."""

import ipaddress
import re
import socket
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Literal, NamedTuple

from duetto.cluster.secret import SECRET_FLAG, ClusterSecret
from duetto.core.errors import ConfigError

ACCEPTED = "accepted: tcp://HOST:PORT, or ipc:///path/of/a/socket on this machine"
_PROBE_S = 0.2  # between two tries
MAX_PATH = 107  # bytes of a Unix socket's address
_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([\w.*-]+)):(\d{1,5}|\*)")


class WireAddress(NamedTuple):
    """Where a socket listens."""

    kind: Literal["tcp", "ipc"]
    host: str  # of tcp, without brackets
    port: int  # of tcp; 0: any that is free
    path: str = ""  # of ipc

    def __str__(self) -> str:
        if self.kind == "ipc":
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port or '*'}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        if self.kind == "ipc":
            return True
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False


def read_address(text: str, flag: str, *, listens: bool) -> WireAddress:
    """Raises ConfigError, naming the flag, for what is no address."""
    if text.startswith("ipc://"):
        path = text.removeprefix("ipc://")
        if not path.startswith("/") or len(path.encode()) > MAX_PATH or "\0" in path:
            raise ConfigError(
                f"{flag} {text:.160}: an absolute path of at most {MAX_PATH} bytes is accepted"
            )
        return WireAddress("ipc", "", 0, path)
    found = _TCP.fullmatch(text)
    port = 0 if found is None or found[3] == "*" else int(found[3])
    if found is None or port > 65535:
        raise ConfigError(f"{flag} {text!r:.160}: is no address; {ACCEPTED}")
    host = found[1] or found[2]
    if host == "*":
        host = "0.0.0.0"
    if host == "localhost":  # ZeroMQ binds to numbers and interfaces only
        host = "127.0.0.1"
    if not listens and port == 0:
        raise ConfigError(f"{flag} {text!r:.160}: needs a port; {ACCEPTED}")
    return WireAddress("tcp", host, port)


def check_exposure_of(address: WireAddress, flag: str, secret: ClusterSecret | None) -> None:
    """Raises ConfigError for an address that others reach, without a secret."""
    if secret is None and not address.is_local:
        raise ConfigError(
            f"{flag} {address}: is not this machine alone, and there is no secret; give "
            f"{SECRET_FLAG}, or keep to tcp://127.0.0.1:PORT or ipc://"
        )


def check_answers(address: WireAddress, flag: str, patience_s: float) -> None:
    """Raises ConfigError if nobody listens there, nor comes within `patience_s`."""
    give_up_at = monotonic() + patience_s
    while (why := _why_unanswered(address)) is not None:
        if monotonic() >= give_up_at:
            raise ConfigError(f"{flag} {address}: nobody answers there ({why})")
        sleep(_PROBE_S)


def _why_unanswered(address: WireAddress) -> str | None:
    try:
        if address.kind == "tcp":
            socket.create_connection((address.host, address.port), timeout=5.0).close()
        else:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(5.0)
                probe.connect(address.path)
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_free(address: WireAddress, flag: str) -> None:
    """Raises ConfigError if something else is there: ZeroMQ would take over a Unix socket."""
    if address.kind != "ipc":
        return
    path = Path(address.path)
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {address}: there is no folder {path.parent}")
    if path.exists() and not path.is_socket():
        raise ConfigError(f"{flag} {address}: a file is there, and no socket; choose another path")
    if path.exists() and _why_unanswered(address) is None:
        raise in_use(address, flag)


def in_use(address: WireAddress, flag: str) -> ConfigError:
    return ConfigError(f"{flag} {address}: another program is using it; choose another one")
