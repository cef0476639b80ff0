"""Who may take part: a secret that all engines and doors of one cluster share.

It gives CURVE keys of both sides of a ZeroMQ connection, so that who does not know it is refused
before a frame is read and what is said is encrypted, and answers to challenges for connections that
are not ZeroMQ's (KV links over TCP). Without a secret nothing listens, or connects, beyond this
machine. Knows sockets' options; not what is sent.
"""

import hashlib
import hmac
import os
import secrets
import stat
from binascii import Error as NotBase64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import zmq
from zmq.utils import z85

from duetto.core.errors import ConfigError
from duetto.core.files import read_file

SECRET_FLAG = "--cluster-secret-file"
SECRET_VARIABLE = "DUETTO_CLUSTER_SECRET"
LEAST_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096
NONCE_BYTES = 32
DOMAIN = b"duetto"
ZAP_ADDRESS = "inproc://zeromq.zap.01"  # the specification's
_MAX_ZAP_PARTS = 16


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """An X25519 key pair, in ZeroMQ's notation."""

    public: bytes
    secret: bytes = field(repr=False)


class ClusterSecret:
    """The shared secret. All that is derived from it is of its own label, so that no use of it
    tells anything of another."""

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError for one that is too short to be a secret."""
        if len(secret) < LEAST_SECRET_BYTES:
            raise ValueError(
                f"has {len(secret)} bytes; at least {LEAST_SECRET_BYTES} are accepted, as "
                f"`openssl rand -hex 32` gives"
            )
        self._root = hmac.digest(b"duetto/cluster/1", secret, "sha256")  # HKDF's extract
        self.listener = self._key_pair(b"curve/listener")
        self.caller = self._key_pair(b"curve/caller")

    def __repr__(self) -> str:
        return "ClusterSecret(...)"

    def derived(self, label: bytes) -> bytes:
        """32 bytes for one use (HKDF's expand, one block)."""
        return hmac.digest(self._root, label + b"\x01", "sha256")

    def _key_pair(self, label: bytes) -> CurveKeys:
        key = z85.encode(self.derived(label))
        return CurveKeys(zmq.curve_public(key), key)


def read_secret(
    file: str | None, environment: Mapping[str, str] = os.environ
) -> ClusterSecret | None:
    """The secret in a file, or else in the environment; None if there is none.

    Raises ConfigError for one that is too short, or that others could read.
    """
    if file is not None:
        return _secret(f"{SECRET_FLAG} {file}", _read_private(Path(file)))
    given = environment.get(SECRET_VARIABLE)
    return None if given is None else _secret(SECRET_VARIABLE, given.strip().encode())


def _secret(where: str, secret: bytes) -> ClusterSecret:
    try:
        return ClusterSecret(secret)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_private(file: Path) -> bytes:
    try:
        mode = file.stat().st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            raise ConfigError(
                f"{SECRET_FLAG} {file}: others may read or write it (mode {mode & 0o777:o}); "
                f"accepted: a file of its owner alone (chmod 600)"
            )
        return read_file(file, MAX_SECRET_BYTES, is_private=True).strip()
    except OSError as error:  # UnfitFile is one
        raise ConfigError(f"{SECRET_FLAG} {file}: {error.strerror or error}") from None


# --- ZeroMQ ----------------------------------------------------------------------------------


def guard(socket: "zmq.Socket[Any]", secret: ClusterSecret | None, *, listens: bool) -> None:
    """Give a socket its side's keys, before it binds or connects. One that listens answers nobody
    unless a `Gatekeeper` runs in its context."""
    if secret is None:
        return
    own = secret.listener if listens else secret.caller
    socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    if listens:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody there to ask: nobody comes in
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, secret.listener.public)


class Gatekeeper:
    """Lets those in who have the callers' key, in one ZeroMQ context (RFC 27, ZAP).

    Its thread ends with the context: `context.term()`, once all sockets are closed.
    """

    def __init__(self, context: "zmq.Context[Any]", secret: ClusterSecret) -> None:
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP_ADDRESS)
        self._key = secret.caller.public
        self.num_refused = 0
        self._thread = Thread(target=self._run, name="duetto-gatekeeper", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        except zmq.ContextTerminated:
            self._socket.close()

    def _answer(self, parts: list[bytes]) -> list[bytes]:
        """version, request id, domain, address, identity, mechanism, credentials."""
        request_id = parts[1] if len(parts) > 1 else b""
        may = len(parts) == 7 and parts[0] == b"1.0" and parts[2] == DOMAIN
        may = may and parts[5] == b"CURVE" and self._is_callers(parts[6])
        self.num_refused += not may
        status = [b"200", b"OK"] if may else [b"400", b"another secret, or none"]
        return [b"1.0", request_id, *status, b"duetto" if may else b"", b""]

    def _is_callers(self, key: bytes) -> bool:
        try:
            return len(key) == 32 and hmac.compare_digest(z85.encode(key), self._key)
        except (NotBase64, ValueError):
            return False


# --- what is no ZeroMQ -----------------------------------------------------------------------


def challenge() -> bytes:
    """A nonce, which is used once."""
    return secrets.token_bytes(NONCE_BYTES)


def answer(secret: ClusterSecret, nonce: bytes, label: bytes) -> bytes:
    """What only who knows the secret can say to a challenge. `label` tells whose answer it is and
    to what: both sides of a connection have their own, or one could be made to answer for the
    other."""
    key = secret.derived(b"answer/" + label)
    return hmac.digest(key, nonce, hashlib.sha256)


def is_answer(secret: ClusterSecret, nonce: bytes, label: bytes, given: bytes) -> bool:
    """In a time that does not depend on where the two differ."""
    return hmac.compare_digest(answer(secret, nonce, label), given)
