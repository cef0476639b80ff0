"""The other side dies, is stopped, or is cut off; or is none of ours."""

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from link_world import World, bytes_in, empty_like, random_rows, send_all, wait_until

from duetto.backends.cpu.native import native
from duetto.cluster.links import handshake
from duetto.cluster.links.choose import connect_link, listen_for_links
from duetto.cluster.links.headers import (
    ControlParser,
    SentPart,
    frame_message,
    part_header,
    part_in_header,
)
from duetto.cluster.links.link import LinkLost, RowsSent
from duetto.cluster.links.tcp import LinkTLS
from duetto.cluster.secret import ClusterSecret
from duetto.core.errors import ConfigError

ADDRESSES = ["shm://*", "tcp://127.0.0.1:*"]
ONE = ClusterSecret(b"one secret of the cluster")
ANOTHER = ClusterSecret(b"another secret of another")
SENDER = """
import sys
import numpy as np
from duetto.cluster.links.choose import connect_link
from duetto.cluster.links.link import BlockRows, LinkLost, RowsSent

class Nobody:
    def received(self, frame): pass
    def places(self, rows): return None
    def arrived(self, rows): pass
    def lost(self, reason): pass

link = connect_link(sys.argv[1], Nobody(), dead_after_s=float(sys.argv[2]))
data = BlockRows([np.full((64, 1 << 16), 7, np.uint8)], np.arange(64, dtype=np.int32))
try:
    for transfer in range(1 << 30):
        link.send_rows(RowsSent(1, 0, 0, 64), data)
except LinkLost as loss:
    print("sender:", loss)
"""


class Listening:
    """A listener whose links all have one user."""

    def __init__(self, address: str, **options: Any) -> None:
        self.user, self.ends = World(), []
        self.listener = listen_for_links(address, self._accept, **options)

    def _accept(self, end: Any) -> World:
        self.ends.append(end)
        return self.user

    def close(self) -> None:
        self.listener.close()
        for end in self.ends:
            end.close()
            assert end.join(30)


_listening: list[Listening] = []


def listen(address: str, **options: Any) -> Listening:
    _listening.append(Listening(address, **options))
    return _listening[-1]


@contextmanager
def sending_process(address: str, dead_after_s: float) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", SENDER, address, str(dead_after_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    while _listening:
        _listening.pop().close()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("duetto-link")])


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_peer_that_is_killed_amid_rows(address):
    here = listen(address)
    data = random_rows(1, 64, (1 << 16,), 64)
    here.user.expected[1, 0] = places = empty_like(data, 64)
    with sending_process(here.listener.address, 3.0) as process:
        wait_until(lambda: here.user.told)
        process.kill()
        here.user.wait_for(lambda told: told and isinstance(told[-1], str))
    assert here.user.reasons() == ["the other side closed the link, or is gone"]
    places.arrays[0][:] = 9  # what is lost may be given to others
    here.close()
    assert (places.arrays[0] == 9).all()


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_peer_that_is_stopped_and_wakes_up_later(address):
    """It is dead after some silence, and then writes nothing into what was given to others."""
    here = listen(address, dead_after_s=1.0)
    data = random_rows(1, 64, (1 << 16,), 64)
    here.user.expected[1, 0] = places = empty_like(data, 64)
    with sending_process(here.listener.address, 1.0) as process:
        wait_until(lambda: here.user.told)
        process.send_signal(signal.SIGSTOP)
        here.user.wait_for(lambda told: told and isinstance(told[-1], str))
        assert "for 1 s" in here.user.reasons()[0]
        places.arrays[0][:] = 9
        process.send_signal(signal.SIGCONT)
        assert "sender: " in process.communicate(timeout=30)[0]
    assert (places.arrays[0] == 9).all()
    here.close()


@pytest.mark.oracle
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_receiver_that_is_stopped_holds_nobody_up(address):
    here = listen(address, dead_after_s=60.0)
    goes_on = threading.Event()
    try:
        with sending_process(here.listener.address, 1.0) as process:
            wait_until(lambda: here.user.asked)
            here.user.places = lambda rows: goes_on.wait() and None  # type: ignore[assignment]
            told = process.communicate(timeout=30)[0]
    finally:
        goes_on.set()
    assert "took nothing for 1 s" in told or "does not answer" in told
    here.close()


class Proxy:
    """Forwards a listener's connections until it is cut: then bytes go nowhere, and both sides'
    sockets stay open (a half-open link)."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._target = port
        self._is_cut = False
        self._wires: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                a, _ = self._server.accept()
                b = socket.create_connection(("127.0.0.1", self._target))
                self._wires += [a, b]
                for one, other in ((a, b), (b, a)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if not self._is_cut:
                    other.sendall(data)

    def cut(self) -> None:
        self._is_cut = True

    def close(self) -> None:
        for wire in (self._server, *self._wires):
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
            wire.close()


def test_a_half_open_link_is_seen_by_both_sides():
    here = listen("tcp://127.0.0.1:*", dead_after_s=1.0)
    proxy = Proxy(int(here.listener.address.rsplit(":", 1)[1]))
    user = World()
    address = f"tcp://127.0.0.1:{proxy.port}"
    link: Any = connect_link(address, user, dead_after_s=1.0)
    link.send(b"hello")
    here.user.wait_for(lambda told: told == [b"hello"])
    proxy.cut()
    for one in (user, here.user):
        one.wait_for(lambda told: told and isinstance(told[-1], str))
        assert "silent for 1 s" in one.reasons()[0]
    with pytest.raises(LinkLost, match="silent"):
        link.send(b"")
    assert link.join(30)
    proxy.close()
    here.close()


@pytest.mark.oracle
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_idle_link_lives(address):
    here = listen(address, dead_after_s=0.5)
    user = World()
    link: Any = connect_link(here.listener.address, user, dead_after_s=0.5)
    threading.Event().wait(2.0)  # four times as long as silence is death
    link.send(b"hello")
    here.user.wait_for(lambda told: told == [b"hello"])
    assert user.told == []
    link.close()
    assert link.join(30)
    here.close()


# --- who may ---------------------------------------------------------------------------------


def test_with_the_same_secret():
    here = listen("tcp://127.0.0.1:*", secret=ONE)
    user = World()
    link: Any = connect_link(here.listener.address, user, ONE)
    link.send(b"hello")
    here.user.wait_for(lambda told: told == [b"hello"])
    link.close()
    assert link.join(30)
    here.close()


@pytest.mark.parametrize(
    "ours, theirs, why",
    [
        (ANOTHER, ONE, "hung up"),  # who listens answers nobody who does not know it
        (None, ONE, "other side has a secret, and this one none"),
        (ONE, None, "this side has a secret, and the other one none"),
    ],
)
def test_another_secret_or_none_is_refused(ours, theirs, why):
    here = listen("tcp://127.0.0.1:*", secret=theirs)
    user = World()
    with pytest.raises(LinkLost, match=why):
        connect_link(here.listener.address, user, ours)
    here.close()
    assert here.ends == [] and user.told == []


def test_beyond_this_machine_needs_a_secret():
    with pytest.raises(ConfigError, match="--cluster-secret-file"):
        listen("tcp://0.0.0.0:*")
    with pytest.raises(LinkLost, match="--cluster-secret-file"):
        connect_link("tcp://192.0.2.1:5000", World())


@pytest.mark.parametrize(
    "address",
    ["ucx://host:1", "tcp://127.0.0.1", "shm://", "shm://relative", "shm://@" + "x" * 200],
)
def test_what_is_no_address_is_one_line(address):
    with pytest.raises(ConfigError, match="accepted"):
        listen(address)
    with pytest.raises(LinkLost, match="accepted"):
        connect_link(address, World())


def test_nobody_listens(tmp_path):
    for address in ("tcp://127.0.0.1:1", f"shm://{tmp_path}/none", "shm://@duetto-none"):
        with pytest.raises(LinkLost, match=r"refused|No such file"):
            connect_link(address, World())


def test_an_address_in_use():
    here = listen("tcp://127.0.0.1:*")
    with pytest.raises(ConfigError, match="another program is using it"):
        listen(here.listener.address)
    here.close()
    shared = listen("shm://*")
    with pytest.raises(ConfigError, match="in use"):
        listen(shared.listener.address)
    shared.close()


def test_a_socket_in_a_folder_is_taken_away(tmp_path):
    here = listen(f"shm://{tmp_path}/link")
    link: Any = connect_link(here.listener.address, World())
    link.close()
    here.close()
    assert list(tmp_path.iterdir()) == []


def test_another_user_is_refused(monkeypatch):
    here = listen("shm://*")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(LinkLost, match="accepted: user 12345"):
        connect_link(here.listener.address, World())
    here.close()


# --- TLS -------------------------------------------------------------------------------------


def certificate(folder: Path, name: str, signed_by: Path | None = None) -> Path:
    """`name`.pem and `name`.key, signed by another or by itself."""
    own = folder / name
    sign = [] if signed_by is None else ["-CA", f"{signed_by}.pem", "-CAkey", f"{signed_by}.key"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", f"/CN={name}", "-days", "2", *sign]
    command += ["-keyout", f"{own}.key", "-out", f"{own}.pem"]
    subprocess.run(command, check=True, capture_output=True)
    return own


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")
def test_tls_by_files(tmp_path):
    authority, stranger = certificate(tmp_path, "authority"), certificate(tmp_path, "stranger")
    own = certificate(tmp_path, "own", authority)

    def tls(of: Path, by: Path) -> LinkTLS:
        return LinkTLS(*(Path(f"{name}") for name in (f"{of}.pem", f"{of}.key", f"{by}.pem")))

    here = listen("tcp://127.0.0.1:*", secret=ONE, tls=tls(own, authority))
    user = World()
    link: Any = connect_link(here.listener.address, user, ONE, tls=tls(own, authority))
    sent = random_rows(1, 300, (20000, 24), 290)
    here.user.expected[1, 0] = places = empty_like(sent, 300)
    user.expected[2, 0] = back = empty_like(sent, 300)
    threads = [
        threading.Thread(target=send_all, args=(link, 1, 0, sent)),
        threading.Thread(target=send_all, args=(here.ends[0], 2, 0, sent)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    link.send(b"done")
    here.user.wait_for(lambda told: b"done" in told)
    here.ends[0].send(b"done too")
    user.wait_for(lambda told: b"done too" in told)
    assert bytes_in(places) == bytes_in(back) == bytes_in(sent)
    for wrong in (tls(stranger, authority), tls(own, stranger), None):
        with pytest.raises(LinkLost):
            connect_link(here.listener.address, World(), ONE, tls=wrong)
    with pytest.raises(ConfigError, match="PEM files"):
        listen("tcp://127.0.0.1:*", tls=tls(authority, tmp_path / "none"))
    link.close()
    assert link.join(30)
    here.close()


# --- a ring that the other side writes as it likes -----------------------------------------


def test_a_ring_whose_counts_cannot_be_is_broken():
    """Whatever stands in the memory that two processes share, nothing is touched outside of it and
    of the places."""
    rng = random.Random(5)
    stop = np.zeros(1, np.uint32)
    arena = np.zeros((8, 256), np.uint8)
    blocks = np.array([1, 6, 3], np.int32)
    outcomes = set()
    for number in range(300):
        memory = np.zeros(4096 * 2 + 64, np.uint8)
        start = -memory.ctypes.data % 64
        ring = memory[start : start + 4096 * 2]
        counts = ring[:4096].view(np.uint64)
        value = rng.choice([1, 700, 4096, 4097, 2**63, 2**64 - 1])
        counts[rng.choice([0, 16])] = np.uint64(value)
        if number % 2:
            ring[4096:] = 9
            outcomes.add(native.take_rows(ring, [arena], blocks, 0, 0.001, stop))
        else:
            outcomes.add(native.put_rows(ring, [arena], blocks, 0, 0.001, stop))
        assert not memory[:start].any() and not memory[start + 8192 :].any()
    assert -2 in outcomes and 768 in outcomes
    assert not arena[[0, 2, 4, 5, 7]].any() and arena[1].any()


def test_a_stop_ends_who_waits_for_a_ring():
    ring = np.zeros(4096 * 2 + 64, np.uint8)
    ring = ring[-ring.ctypes.data % 64 :][: 4096 * 2]
    stop = np.zeros(1, np.uint32)
    arena, blocks = np.zeros((2, 1 << 20), np.uint8), np.array([0, 1], np.int32)
    found: list[int] = []
    thread = threading.Thread(
        target=lambda: found.append(native.put_rows(ring, [arena], blocks, 0, 600.0, stop))
    )
    thread.start()
    stop[0] = 1
    thread.join(20)
    assert not thread.is_alive() and 0 <= found[0] <= 4096


# --- bytes of strangers ----------------------------------------------------------------------


def test_headers_that_are_none():
    good = part_header(SentPart(RowsSent(2**64 - 1, 3, 4, 5), 6, 700))
    assert part_in_header(good) == SentPart(RowsSent(2**64 - 1, 3, 4, 5), 6, 700)
    rng = random.Random(1)
    accepted = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        try:
            part = part_in_header(bytes(data))
        except LinkLost:
            continue
        accepted += 1
        assert 1 <= part.rows.num_blocks <= part.num_bytes <= 1 << 40
    assert accepted


def test_a_control_channel_of_random_bytes():
    rng = random.Random(2)
    message = frame_message((1, 2), b"hello")
    for size in range(1, len(message) + 1):  # in pieces of any size
        parser, found = ControlParser(2), []
        for start in range(0, 3 * len(message), size):
            found += parser.feed((message * 3)[start : start + size])
        assert [one.frame for one in found] == [b"hello"] * 3 and found[0].counts == (1, 2)
    for _ in range(3000):
        parser = ControlParser(2)
        data = bytearray(message * 2)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with suppress(LinkLost):
            assert all(len(one.frame) <= 1 << 20 for one in parser.feed(bytes(data)))
    with pytest.raises(LinkLost, match="at most 1048576"):
        ControlParser(2).feed(struct.pack("<BBHI", 1, 2, 0, (1 << 20) + 1))


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_listener_survives_what_says_anything(address):
    here = listen(address)
    rng = random.Random(3)
    if address.startswith("shm"):
        family, place = socket.AF_UNIX, "\0" + here.listener.address.removeprefix("shm://@")
    else:
        family, place = socket.AF_INET, ("127.0.0.1", int(here.listener.address[-5:].strip(":")))
    hello = handshake._packed(
        handshake.LinkHello(handshake.ConnectionKind.CONTROL, 1, 2000, bytes(16)), None, bytes(32)
    )
    for number in range(60):
        with socket.socket(family, socket.SOCK_STREAM) as wire:
            wire.connect(place)
            data = bytearray(hello)
            for _ in range(number % 4):
                data[rng.randrange(len(data))] = rng.randrange(256)
            wire.sendall(data[: rng.choice([0, 5, len(data)])] if number % 3 else bytes(data) * 2)
    user = World()
    link: Any = connect_link(here.listener.address, user)
    link.send(b"hello")
    here.user.wait_for(lambda told: told == [b"hello"])
    link.close()
    assert link.join(30)
    here.close()


def test_a_peer_that_knows_the_way_and_sends_anything():
    """After the handshake: random headers and lengths end the link, and write nothing outside."""
    rng = random.Random(4)
    for number in range(25):
        here = listen("tcp://127.0.0.1:*", dead_after_s=2.0)
        places = empty_like(random_rows(1, 8, (64,), 4), 8)
        here.user.expected[1, 0] = places
        place = ("127.0.0.1", int(here.listener.address.rsplit(":", 1)[1]))
        control, carrier = socket.create_connection(place), socket.create_connection(place)
        hello = handshake.LinkHello(handshake.ConnectionKind.CONTROL, 1, 2000, bytes(16))
        session = handshake.call_link(control, hello, None).session
        hello = handshake.LinkHello(handshake.ConnectionKind.CARRIER, 0, 2000, session)
        handshake.call_link(carrier, hello, None)
        part = SentPart(RowsSent(1, 0, rng.choice([0, 2, 5]), rng.randint(1, 6)), 0, 256)
        header = bytearray(part_header(part))
        for _ in range(number % 3):
            header[rng.randrange(len(header))] = rng.randrange(256)
        with suppress(OSError):
            carrier.sendall(header + rng.randbytes(rng.randrange(600)))
            control.sendall(rng.randbytes(rng.randrange(1, 64)))
        control.close()
        carrier.close()
        here.user.wait_for(lambda told: told and isinstance(told[-1], str))
        outside = np.setdiff1d(np.arange(8), places.blocks)
        assert not places.arrays[0][outside].any()
        here.close()
