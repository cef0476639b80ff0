"""A worker on another network, made by the test: reached with a secret, lost when the link is down
though no connection ends, and back when it is up."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from cluster_world import Heard, address_of, door
from fakes import make_request

from duetto import __version__
from duetto.cluster.secret import ClusterSecret
from duetto.core.request import FinishReason

SECRET = "a secret of this test alone"
NAMES = tuple(
    f"dw{os.getpid()}{end}" for end in ("n", "a", "b")
)  # a namespace, both ends of a link


def ip(*words, is_checked=True):
    subprocess.run(("ip", *words), check=is_checked, capture_output=True)


@contextmanager
def network():
    """A namespace with 10.213.7.2, behind a link to this one's 10.213.7.1."""
    space, ours, theirs = NAMES
    try:
        ip("netns", "add", space)
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", space)
        ip("addr", "add", "10.213.7.1/30", "dev", ours)
        ip("-n", space, "addr", "add", "10.213.7.2/30", "dev", theirs)
        for words in (("link", "set", ours), ("-n", space, "link", "set", theirs)):
            ip(*words, "up")
    except (OSError, subprocess.CalledProcessError):
        tear_down()
        pytest.skip("needs ip, and the right to make network namespaces")
    try:
        yield space, ours
    finally:
        tear_down()


def tear_down():
    ip("netns", "del", NAMES[0], is_checked=False)
    ip("link", "del", NAMES[1], is_checked=False)


@pytest.mark.oracle  # takes long
def test_a_worker_behind_a_link_that_goes_down_and_up():
    address = "tcp://10.213.7.2:5713"
    options = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**24))
    worker = (sys.executable, "-m", "duetto", "worker", "--listen", address, *options)
    heard = Heard(rescues=True)
    with network() as (space, link):
        command = ("ip", "netns", "exec", space, *worker)
        variables = os.environ | {"DUETTO_CLUSTER_SECRET": SECRET}
        with (
            subprocess.Popen(command, env=variables, stderr=subprocess.PIPE) as process,
            door(heard, ClusterSecret(SECRET.encode()), 1.5, version=__version__) as doorway,
        ):
            try:
                threading.Thread(target=process.stderr.read, daemon=True).start()
                doorway.call(address_of(address))
                heard.worker().add(make_request("before", max_tokens=4))
                assert heard.final("before").finish_reason is FinishReason.LENGTH
                ip("link", "set", link, "down")
                heard.workers[0].add(make_request("unheard", max_tokens=4))
                heard.wait(lambda: heard.gone)
                assert "silent for" in heard.gone[0][1]
                assert [request.request_id for request in heard.rescued] == ["unheard"]
                ip("link", "set", link, "up")
                heard.worker(1).add(make_request("after", max_tokens=4))
                assert heard.final("after").finish_reason is FinishReason.LENGTH
                assert heard.tokens("after") == heard.tokens("before")
            finally:
                process.kill()
