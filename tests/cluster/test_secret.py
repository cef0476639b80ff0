"""The shared secret: where it may stand, what is derived, and who is let in."""

import socket

import pytest
import zmq
from zmq.utils import z85

from duetto.cluster.address import check_exposure_of, check_free, read_address
from duetto.cluster.secret import (
    SECRET_VARIABLE,
    ClusterSecret,
    Gatekeeper,
    answer,
    challenge,
    guard,
    is_answer,
    read_secret,
)
from duetto.core.errors import ConfigError

OURS = ClusterSecret(b"a secret of ours, long enough")
OTHERS = ClusterSecret(b"a secret of others, long enough")


@pytest.fixture
def file(tmp_path):
    made = tmp_path / "secret"
    made.write_text("0123456789abcdef0123\n")
    made.chmod(0o600)
    return made


def test_a_file_of_its_owner_is_read_and_the_environment_without_one(file):
    same = ClusterSecret(b"0123456789abcdef0123")
    assert read_secret(str(file)).listener == same.listener
    assert read_secret(None, {SECRET_VARIABLE: "0123456789abcdef0123"}).caller == same.caller
    assert read_secret(str(file), {SECRET_VARIABLE: "another one that is long"}).caller == (
        same.caller
    )
    assert read_secret(None, {}) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_read_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod 600"):
        read_secret(str(file))


def test_what_is_no_secret_is_refused_in_one_line(file, tmp_path):
    file.write_text("short\n")
    for make, words in (
        (lambda: read_secret(str(file)), "has 5 bytes; at least 16"),
        (lambda: read_secret(str(tmp_path / "none")), "No such file"),
        (lambda: read_secret(str(tmp_path)), "a directory"),
        (lambda: read_secret(None, {SECRET_VARIABLE: ""}), "has 0 bytes; at least 16"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_keys_follow_from_the_secret_and_differ_by_side_and_use():
    again = ClusterSecret(b"a secret of ours, long enough")
    assert again.listener == OURS.listener and again.caller == OURS.caller
    secrets = {s.secret for s in (OURS.listener, OURS.caller, OTHERS.listener, OTHERS.caller)}
    assert len(secrets) == 4
    assert "secret of ours" not in repr(OURS) and str(z85.decode(OURS.caller.secret)) not in repr(
        OURS.caller
    )


def test_an_answer_is_of_its_secret_nonce_and_label():
    nonce = challenge()
    right = answer(OURS, nonce, b"link/reader")
    assert nonce != challenge() and len(nonce) == len(right) == 32
    assert is_answer(OURS, nonce, b"link/reader", right)
    assert not is_answer(OTHERS, nonce, b"link/reader", right)
    assert not is_answer(OURS, challenge(), b"link/reader", right)
    assert not is_answer(OURS, nonce, b"link/writer", right)
    assert not is_answer(OURS, nonce, b"link/reader", right[:-1])
    assert not is_answer(OURS, nonce, b"link/reader", b"")


def hears(callers_guard, has_gatekeeper=True):
    """Whether a listener with our secret hears what a caller says."""
    context = zmq.Context()
    gatekeeper = Gatekeeper(context, OURS) if has_gatekeeper else None
    listener, caller = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    try:
        for each in (listener, caller):
            each.setsockopt(zmq.LINGER, 0)
        guard(listener, OURS, listens=True)
        callers_guard(caller)
        port = listener.bind_to_random_port("tcp://127.0.0.1")
        caller.connect(f"tcp://127.0.0.1:{port}")
        caller.send(b"hello", zmq.NOBLOCK)
        # Who is refused is refused at once: ZAP is asked within this process.
        has_heard = bool(listener.poll(5000 if callers_guard is ours else 150))
        return has_heard, gatekeeper.num_refused if gatekeeper else 0
    finally:
        listener.close()
        caller.close()
        context.term()


def ours(caller):
    guard(caller, OURS, listens=False)


def unknown_client(caller):
    """Knows the listener's public key, and has a key pair of its own."""
    caller.curve_publickey, caller.curve_secretkey = zmq.curve_keypair()
    caller.curve_serverkey = OURS.listener.public


def test_who_has_the_secret_is_heard():
    assert hears(ours) == (True, 0)


@pytest.mark.parametrize(
    "other",
    [lambda caller: guard(caller, OTHERS, listens=False), lambda caller: None],
    ids=["another secret", "no secret"],
)
def test_who_has_not_is_not_heard(other):
    assert hears(other)[0] is False


def test_an_unknown_client_is_refused_though_it_knows_the_public_key():
    has_heard, num_refused = hears(unknown_client)
    assert not has_heard and num_refused >= 1


def test_without_a_gatekeeper_nobody_comes_in():
    assert hears(unknown_client, has_gatekeeper=False) == (False, 0)


@pytest.mark.parametrize(
    "text",
    [
        "tcp://127.0.0.1:5000",
        "tcp://127.9.0.1:*",
        "tcp://[::1]:1",
        "ipc:///tmp/x",
        "tcp://localhost:1",
    ],
)
def test_loopback_and_ipc_need_no_secret(text):
    check_exposure_of(read_address(text, "--listen", listens=True), "--listen", None)


@pytest.mark.parametrize(
    "text",
    ["tcp://0.0.0.0:5000", "tcp://*:5000", "tcp://10.0.0.1:1", "tcp://[::]:1", "tcp://a.b:1"],
)
def test_what_others_reach_needs_one(text):
    address = read_address(text, "--listen", listens=True)
    check_exposure_of(address, "--listen", OURS)
    with pytest.raises(ConfigError, match="no secret; give --cluster-secret-file"):
        check_exposure_of(address, "--listen", None)


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:5000", "tcp://", "tcp://a", "tcp://a:70000", "tcp://a b:1", "tcp://a:1/x",
     "http://a:1", "inproc://x", "ipc://relative", "ipc://@name", "ipc:///" + 200 * "x", "pgm://a:1",
     "tcp://a;127.0.0.1:1", "tcp://:1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="accepted"):
        read_address(text, "--listen", listens=True)


def test_who_connects_needs_a_port():
    with pytest.raises(ConfigError, match="needs a port"):
        read_address("tcp://127.0.0.1:*", "--join", listens=False)


def test_a_unix_socket_in_use_is_not_taken_over(tmp_path):
    path = tmp_path / "s"
    address = read_address(f"ipc://{path}", "--listen", listens=True)
    check_free(address, "--listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ConfigError, match="another program is using it"):
            check_free(address, "--listen")
    check_free(address, "--listen")  # left behind by a program that has ended
    path.unlink()
    path.write_text("a file")
    with pytest.raises(ConfigError, match="a file is there"):
        check_free(address, "--listen")
    with pytest.raises(ConfigError, match="there is no folder"):
        check_free(read_address(f"ipc://{tmp_path}/no/s", "--listen", listens=True), "--listen")
