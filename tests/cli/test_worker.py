"""`duetto worker`: what it refuses before a model is loaded, each in one line."""

import socket

import pytest
from cli.in_process import duetto

LISTEN = ("--listen", "tcp://127.0.0.1:*")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "needs --listen ADDRESS for doors to come to, or --join ADDRESS of one"),
        (("--listen", "127.0.0.1:1"), "--listen '127.0.0.1:1': is no address; accepted: tcp://"),
        (("--listen", "tcp://0.0.0.0:0"), "no secret; give --cluster-secret-file"),
        (("--join", "tcp://192.0.2.1:1"), "no secret; give --cluster-secret-file"),
        (("--join", "tcp://127.0.0.1:*"), "needs a port"),
        (("--join", "ipc:///none/s", "--join-timeout", "0"), "nobody answers there (No such file"),
        ((*LISTEN, "--role", "both-ish"), 'Invalid value "both-ish" for --role'),
        ((*LISTEN, "--cluster-secret-file", "/none"), "--cluster-secret-file /none: No such file"),
        ((*LISTEN, "--kv-events", "nowhere"), "--kv-events 'nowhere': is no address"),
        ((*LISTEN, "--kv-events", "tcp://10.0.0.1:5557"), "no secret; give --cluster-secret-file"),
        ((*LISTEN, "--kv-events", "tcp://*:*"), "name an address of this machine"),
        ((*LISTEN, "--kv-events", "tcp://127.0.0.1:*", "--pp", "2"), "with --pp each of the"),
        ((*LISTEN, "--kv-link-tls", "a.pem"), "--kv-link-tls a.pem: CERTIFICATE,KEY,AUTHORITY"),
        ((*LISTEN, "--kv-link-tls", "/a,/b,/c"), "PEM files of a certificate, its key and its"),
        ((*LISTEN, "--max-local-prefill", "9"), "--max-local-prefill with --role both"),
        ((*LISTEN, "--dead-after", "0.1"), "--dead-after 0.1: must be from 1 to 3600 seconds"),
        ((*LISTEN, "--shutdown-timeout", "-1"), "must be from 0 to 86400 seconds"),
        (("none/such", *LISTEN, "--block-size", "0"), "--block-size"),
        (("/none/such", *LISTEN), "/none/such"),
    ],
)
def test_what_is_refused_is_told_in_one_line(words, said):
    ended = duetto("worker", *words)
    assert ended.returncode == 1 and said in ended.stderr
    assert ended.stderr.count("\n") == 1 and not ended.stdout


def test_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        ended = duetto("worker", "--listen", address)
    assert ended.returncode == 1
    assert f"--listen {address}: another program is using it" in ended.stderr


def test_a_secret_that_others_can_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x" * 32)
    secret.chmod(0o644)
    ended = duetto("worker", *LISTEN, "--cluster-secret-file", str(secret))
    assert ended.returncode == 1 and "others may read or write it (mode 644)" in ended.stderr
    ended = duetto("worker", *LISTEN, DUETTO_CLUSTER_SECRET="short")
    assert "DUETTO_CLUSTER_SECRET: has 5 bytes; at least 16 are accepted" in ended.stderr
