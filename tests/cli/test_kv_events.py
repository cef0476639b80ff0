"""`duetto serve --kv-events`: what is refused before a model is loaded, each in one line."""

import pytest
from cli.in_process import duetto

OPEN = '{"enable_kv_cache_events":true,"endpoint":"tcp://*:*"}'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kv-events", "5557"), "--kv-events '5557': is no address; accepted: tcp://"),
        (("--kv-events", "tcp://0.0.0.0:5557"), "there is no secret"),
        (("--kv-events-config", OPEN), "--kv-events-config tcp://0.0.0.0:*: is not this machine"),
        (("--kv-events-config", "{"), "accepted: enable_kv_cache_events, publisher, endpoint"),
        (("--kv-events", "ipc:///tmp/x", "--kv-events-config", "{}"), "give one of them"),
        (("--kv-events", "tcp://127.0.0.1:*", "--replicas", "2"), "with --replicas each worker"),
        (("--insecure-kv-events",), "needs --kv-events or --kv-events-config"),
        (("--kv-events", "tcp://127.0.0.1:*", "--no-enable-prefix-caching"), "the prefix cache"),
        (("--kv-events", "tcp://127.0.0.1:*", "--pp", "2"), "with --pp each of the batches"),
    ],
)
def test_what_is_refused_is_told_in_one_line(words, said):
    ended = duetto("serve", "none/such", "--port", "0", *words)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
