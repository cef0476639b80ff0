"""How a connection of a link begins: both say hello, and, with a secret, answer each other's
challenge. The one who listens answers nobody who has not answered first.

This tells who is there. It does not hide what is said afterwards, nor keep it from being changed on
the way: that is TLS's.
"""

import socket
from collections.abc import Callable
from enum import IntEnum
from secrets import token_bytes
from struct import Struct
from typing import NamedTuple

from duetto.cluster.links.headers import MAX_CARRIERS
from duetto.cluster.links.link import LinkLost
from duetto.cluster.secret import NONCE_BYTES, ClusterSecret, answer, challenge, is_answer

# magic, kind, has a secret, number, 0, dead after ms, session, nonce
_HELLO = Struct(f"<16sBBBBI16s{NONCE_BYTES}s")
MAX_DEAD_AFTER_MS = 3_600_000
_MAGIC = b"duetto-kv-link/1"
_ANSWER_BYTES = 32
SESSION_BYTES = 16
_CALLER, _LISTENER = b"kv-link/caller", b"kv-link/listener"
PATIENCE_S = 5.0  # of both sides, for a handshake


class ConnectionKind(IntEnum):
    CONTROL = 0
    CARRIER = 1


class LinkHello(NamedTuple):
    """What a connection is for."""

    kind: ConnectionKind
    number: int  # of a carrier; of the control channel: how many carriers there will be
    dead_after_ms: int  # how long this side takes silence: the other one's heartbeats are by it
    session: bytes  # which link it belongs to; of the control channel, the listener says it


def call_link(wire: socket.socket, hello: LinkHello, secret: ClusterSecret | None) -> LinkHello:
    """Say hello; what the other side says, and the session's name. Raises LinkLost, or OSError."""
    own = challenge()
    wire.sendall(_packed(hello, secret, own))
    theirs, nonce, has_secret = _unpacked(_exactly(wire, _HELLO.size))
    _check_secrets(secret, has_secret)
    if secret is not None:
        wire.sendall(answer(secret, nonce + own, _CALLER + bytes([hello.kind, hello.number])))
        if not is_answer(secret, nonce + own, _LISTENER, _exactly(wire, _ANSWER_BYTES)):
            raise LinkLost("who listens there has another --cluster-secret-file")
    elif _exactly(wire, _ANSWER_BYTES) != bytes(_ANSWER_BYTES):
        raise LinkLost("what listens there is no KV link")
    return theirs


def answer_link(
    wire: socket.socket,
    dead_after_ms: int,
    secret: ClusterSecret | None,
    admit: Callable[[LinkHello], None],
) -> LinkHello:
    """What a caller wants; its session is new if it is a link's control channel. `admit` is
    told it before the caller is, who calls again at once. Raises LinkLost, or OSError."""
    hello, nonce, has_secret = _unpacked(_exactly(wire, _HELLO.size))
    if hello.kind is ConnectionKind.CONTROL:
        hello = hello._replace(session=token_bytes(SESSION_BYTES))
    own = challenge()
    wire.sendall(_packed(hello._replace(dead_after_ms=dead_after_ms), secret, own))
    _check_secrets(secret, has_secret)
    reply = bytes(_ANSWER_BYTES)
    if secret is not None:
        label = _CALLER + bytes([hello.kind, hello.number])
        if not is_answer(secret, own + nonce, label, _exactly(wire, _ANSWER_BYTES)):
            raise LinkLost("who calls has another --cluster-secret-file")
        reply = answer(secret, own + nonce, _LISTENER)
    admit(hello)
    wire.sendall(reply)
    return hello


def _packed(hello: LinkHello, secret: ClusterSecret | None, nonce: bytes) -> bytes:
    has_secret = secret is not None
    return _HELLO.pack(
        *(_MAGIC, hello.kind, has_secret, hello.number, 0),
        *(hello.dead_after_ms, hello.session, nonce),
    )


def _unpacked(data: bytes) -> tuple[LinkHello, bytes, bool]:
    magic, kind, has_secret, number, zero, dead_after_ms, session, nonce = _HELLO.unpack(data)
    if magic != _MAGIC:
        raise LinkLost("the other side is no KV link, or of another version of Duetto")
    is_patient = 1 <= dead_after_ms <= MAX_DEAD_AFTER_MS
    if kind > 1 or has_secret > 1 or zero or number > MAX_CARRIERS or not is_patient:
        raise LinkLost("the other side says hello in another way")
    if kind == ConnectionKind.CONTROL and number == 0:
        raise LinkLost("the other side wants a link without carriers")
    hello = LinkHello(ConnectionKind(kind), number, dead_after_ms, session)
    return hello, nonce, bool(has_secret)


def _check_secrets(secret: ClusterSecret | None, has_secret: bool) -> None:
    if has_secret != (secret is not None):
        who = (
            "the other side has a secret, and this one none"
            if has_secret
            else ("this side has a secret, and the other one none")
        )
        raise LinkLost(f"{who}: give both the same --cluster-secret-file")


def _exactly(wire: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        came = wire.recv(num_bytes - len(data))
        if not came:
            raise LinkLost("the other side hung up before it had said what it is")
        data += came
    return data
