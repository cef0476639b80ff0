"""Connections: who is silent, who does not read, who sends what is no frame, who has no secret."""

import threading
import time

import pytest
import zmq
from cluster_world import (
    CONFIG,
    DEADLINE_S,
    FACTS,
    GatedExecutor,
    Heard,
    address_of,
    decode,
    door,
    pair,
    until,
    worker_server,
)
from fakes import make_request

from duetto.cluster import wire as wires
from duetto.cluster.address import read_address
from duetto.cluster.frames import (
    MAX_FRAME_BYTES,
    Abort,
    Bye,
    Heartbeat,
    Hello,
    Knock,
    Refused,
    Welcome,
    add_frame,
    decode_frame,
    encoded,
    hello,
)
from duetto.cluster.round_trip import RoundTrip
from duetto.cluster.secret import ClusterSecret
from duetto.cluster.wire import Wire
from duetto.core.errors import ConfigError
from duetto.core.request import FinishReason
from duetto.engine.engine import Engine
from duetto.scheduler.scheduler import Scheduler

OURS = ClusterSecret(b"a secret of ours, long enough")
OTHERS = ClusterSecret(b"a secret of others, long enough")


class RawPeer:
    """A socket that says whatever it likes."""

    def __init__(self, address, kind=zmq.DEALER):
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        (self.socket.connect if kind == zmq.DEALER else self.socket.bind)(str(address))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.context.term()

    def send(self, *parts):
        self.socket.send_multipart(parts)

    def heard(self, kind):
        """The next frame of a kind."""
        while self.socket.poll(DEADLINE_S * 1000):
            frame = decode_frame(self.socket.recv_multipart()[-1])
            if isinstance(frame, kind):
                return frame
        raise AssertionError(f"no {kind.__name__} came")


@pytest.fixture
def listening(tmp_path):
    """A worker that listens, and its address."""
    with worker_server() as server:
        address = address_of(f"ipc://{tmp_path}/s")
        server.listen(server.wire.bind(address, "--listen"))
        yield server, address


def enter(peer):
    peer.send(encoded(Knock(1, "1", "raw")))
    assert peer.heard(Hello).version == "1"
    peer.send(encoded(Welcome()))


# --- what is no frame


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([b"\x00\xff"], "no frame"),
        ([b""], "no frame"),
        ([b"a", b"b"], "no frame: 2 parts"),
        ([encoded(Welcome())], "a Welcome that no door sends now"),
        ([encoded(Knock(1, "1", "again"))], "a Knock that no door sends now"),
        ([add_frame(make_request("x" * 300), 0.0)], "a request id of 300 characters"),
        ([add_frame(make_request(""), 0.0)], "a request id of 0 characters"),
    ],
)
def test_what_is_no_frame_ends_that_connection_and_no_other(listening, parts, words):
    _, address = listening
    heard = Heard()
    with door(heard) as doorway, RawPeer(address) as raw:
        doorway.call(address)
        worker = heard.worker()
        enter(raw)
        raw.send(*parts)
        assert words in raw.heard(Bye).reason
        raw.send(encoded(Heartbeat(1.0)))  # nobody knows it any more
        assert "does not know you" in raw.heard(Bye).reason
        worker.add(make_request("a", max_tokens=2))
        assert heard.final("a").finish_reason is FinishReason.LENGTH


def test_before_a_welcome_no_request_is_taken(listening):
    server, address = listening
    with RawPeer(address) as raw:
        raw.send(add_frame(make_request("a"), 0.0))
        assert "does not know you" in raw.heard(Bye).reason
        raw.send(encoded(Knock(1, "1", "raw")))
        assert raw.heard(Hello)
        raw.send(add_frame(make_request("a"), 0.0))
        assert "no door sends now" in raw.heard(Bye).reason
    assert server.num_live == 0 and server.num_joined == 0


def test_an_id_that_is_in_use_ends_the_door_that_repeats_it(tmp_path):
    executor = GatedExecutor()
    executor.gate.clear()  # so that the first is there still
    address = address_of(f"ipc://{tmp_path}/s")
    with worker_server(Engine(Scheduler(CONFIG), executor, decode)) as server:
        server.listen(server.wire.bind(address, "--listen"))
        with RawPeer(address) as raw:
            enter(raw)
            frame = add_frame(make_request("a", max_tokens=100), 0.0)
            raw.send(frame)
            raw.send(frame)
            assert "request id a is in use" in raw.heard(Bye).reason
        executor.gate.set()


def test_a_frame_above_the_limit_is_not_read(listening):
    server, address = listening
    with RawPeer(address) as raw:
        enter(raw)
        until(lambda: server.num_joined)
        raw.send(b"x" * (MAX_FRAME_BYTES + 1))
        until(lambda: not server._doors)  # ZeroMQ has cut it


def test_a_door_of_another_version_is_refused_with_both(listening):
    _, address = listening
    with RawPeer(address) as raw:
        raw.send(encoded(Knock(7, "1", "raw")))
        assert raw.heard(Refused).reason == "another protocol: 7, and here it is 1"


def test_a_worker_whose_facts_cannot_be_is_not_joined(tmp_path):
    heard = Heard()
    with door(heard) as doorway:
        address = address_of(f"ipc://{tmp_path}/d")
        doorway.listen(doorway.wire.bind(address, "--listen"))
        with RawPeer(address) as raw:
            frame = hello(FACTS, "boot", 0.0)
            raw.send(encoded(Hello(1, "1", "boot", 0.0, frame.facts[:-9])))
            assert "no WorkerFacts" in raw.heard(Bye).reason
        with RawPeer(address) as raw:
            raw.send(encoded(frame))
            assert raw.heard(Welcome)
            raw.send(encoded(Abort("a")))
            assert "an Abort that no worker" in raw.heard(Bye).reason.replace("a Abort", "an Abort")
    assert len(heard.workers) == 1 and len(heard.gone) == 1


# --- who is alive


def test_both_hear_heartbeats_and_measure_the_way(tmp_path):
    with pair(tmp_path, dead_after_s=0.4, door_dead_after_s=0.4) as (server, heard, worker):
        until(lambda: worker.round_trip.num_measured > 5)
        assert 0 <= worker.round_trip.least_s <= worker.round_trip.mean_s < DEADLINE_S
        assert worker.is_alive and not heard.gone
        (there,) = server._doors
        until(lambda: there.connection.round_trip.num_measured > 5)


def stop_thread(wire):
    """Let a wire's thread stand still, as of a process that is stopped; what lets it go on."""
    gate = threading.Event()
    wire.call(lambda: gate.wait(DEADLINE_S))
    return gate.set


def test_a_worker_that_is_silent_is_dead(tmp_path):
    with pair(tmp_path, door_dead_after_s=0.3) as (server, heard, worker):
        worker.add(make_request("before", max_tokens=1))
        heard.final("before")
        go_on = stop_thread(server.wire)
        worker.add(make_request("a"))
        assert "silent for" in heard.final("a").error
        go_on()
        assert heard.worker(1) is not worker  # it was called again
        heard.worker(1).add(make_request("b", max_tokens=2))
        assert heard.final("b").finish_reason is FinishReason.LENGTH
        assert len(heard.finals("a")) == 1


def test_a_door_that_is_silent_is_dead(tmp_path):
    with pair(tmp_path, dead_after_s=0.3) as (server, heard, _):
        go_on = stop_thread(heard.worker()._connection._wire)
        until(lambda: not server._doors)
        go_on()
        heard.wait(lambda: heard.gone)
        until(lambda: server._doors)  # and comes back


def test_who_was_away_itself_does_not_take_others_for_dead(tmp_path):
    with pair(tmp_path, dead_after_s=0.5, door_dead_after_s=60.0) as (server, heard, worker):
        go_on = stop_thread(server.wire)
        time.sleep(0.7)  # longer than the door may be silent, in the worker's eyes
        go_on()
        worker.add(make_request("a", max_tokens=2))
        assert heard.final("a").finish_reason is FinishReason.LENGTH
        assert server._doors and not heard.gone


def test_an_address_where_nobody_answers_is_told_and_called_again(tmp_path):
    told, heard = [], Heard()
    address = address_of(f"ipc://{tmp_path}/s")
    with door(heard) as doorway:
        doorway._on_unanswered = lambda *said: told.append(said)
        doorway.call(address)
        until(lambda: told)
        assert told[0] == (address, "nobody listens there", False)
        with worker_server() as server:
            server.listen(server.wire.bind(address, "--listen"))
            assert heard.worker().facts == FACTS


def test_a_worker_joins_again_when_its_door_comes_back(tmp_path):
    told = []
    address = address_of(f"ipc://{tmp_path}/d")
    with worker_server() as server:
        server.on_unanswered = told.append
        server.join(address)
        until(lambda: told)
        assert f"{address} does not answer: nobody listens there" in told[0]
        for _ in range(2):
            heard = Heard()
            with door(heard) as doorway:
                doorway.listen(doorway.wire.bind(address, "--listen"))
                heard.worker().add(make_request("a", max_tokens=1))
                heard.final("a")


def test_frames_of_an_older_worker_are_of_an_older_handle(tmp_path):
    """A worker that comes back at the same address has nothing of the one before."""
    heard = Heard()
    address = address_of(f"ipc://{tmp_path}/s")
    with door(heard) as doorway:
        doorway.call(address)
        for number in range(2):
            with worker_server() as server:
                server.listen(server.wire.bind(address, "--listen"))
                worker = heard.worker(number)
                worker.add(make_request("same", max_tokens=100 if number == 0 else 2))
                heard.wait(lambda w=worker: heard.updates("same") or not w.is_alive)
            heard.wait(lambda n=number: len(heard.gone) > n)
        assert heard.workers[0] is not heard.workers[1]
    reasons = [final.finish_reason for final in heard.finals("same")]
    assert len(reasons) == 2 and not heard.workers[0].num_live


# --- who does not read


def test_a_door_that_does_not_read_is_dropped_and_others_go_on(listening, monkeypatch):
    monkeypatch.setattr(wires, "MAX_PENDING_BYTES", 200_000)
    server, address = listening
    heard = Heard()
    with door(heard) as doorway, RawPeer(address) as raw:
        doorway.call(address)
        worker = heard.worker()
        raw.socket.setsockopt(zmq.RCVHWM, 1)
        enter(raw)
        until(lambda: len(server._doors) == 2)
        (slow,) = [d for d in server._doors if d.connection.peer.endswith("#1")]
        large = encoded(Refused("x" * 100_000))
        for _ in range(2000):
            if slow.connection.is_over:
                break
            slow.connection.send(large)
            assert slow.connection.num_pending_bytes <= 200_000_000
            time.sleep(0.001)
        until(lambda: slow.connection.is_over)
        assert slow.connection.num_pending_bytes == 0
        worker.add(make_request("a", max_tokens=2))
        assert heard.final("a").finish_reason is FinishReason.LENGTH


# --- secrets


@pytest.mark.parametrize(
    ("of_worker", "of_door"),
    [(OURS, OTHERS), (OURS, None), (None, OURS)],
    ids=["another", "none", "only the door's"],
)
def test_who_has_another_secret_does_not_come_in(of_worker, of_door):
    told, heard = [], Heard()
    with worker_server(secret=of_worker) as server, door(heard, secret=of_door) as doorway:
        doorway._on_unanswered = lambda *said: told.append(said)
        bound = server.wire.bind(address_of("tcp://127.0.0.1:*"), "--listen")
        server.listen(bound)
        doorway.call(bound.address)
        until(lambda: told)
        assert "another secret" in told[0][1]
    assert not heard.workers and server.num_joined == 0


def test_who_has_the_same_secret_is_served_over_tcp():
    heard = Heard()
    with worker_server(secret=OURS) as server, door(heard, secret=OURS) as doorway:
        bound = server.wire.bind(address_of("tcp://127.0.0.1:*"), "--listen")
        server.listen(bound)
        doorway.call(bound.address)
        heard.worker().add(make_request("a", max_tokens=2))
        assert heard.final("a").finish_reason is FinishReason.LENGTH


@pytest.fixture
def wire_of():
    made = []

    def make(*args):
        made.append(Wire(*args))
        return made[-1]

    yield make
    for wire in made:
        assert wire.stop()


def test_addresses_of_others_need_a_secret_and_a_port_must_be_free(tmp_path, wire_of):
    wire = wire_of()
    for text in ("tcp://0.0.0.0:0", "tcp://*:*"):
        with pytest.raises(ConfigError, match="no secret; give --cluster-secret-file"):
            wire.bind(read_address(text, "--listen", listens=True), "--listen")
    bound = wire.bind(address_of("tcp://127.0.0.1:*"), "--listen")
    with pytest.raises(ConfigError, match=r"--listen tcp://127.0.0.1:\d+: another program"):
        wire.bind(bound.address, "--listen")
    with pytest.raises(ConfigError, match=r"--listen tcp://192\.0\.2\.1:1: "):
        wire_of(OURS).bind(address_of("tcp://192.0.2.1:1"), "--listen")
    own = wire.bind(address_of(f"ipc://{tmp_path}/s"), "--listen")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="another program is using it"):
        wire_of().bind(own.address, "--listen")
    for each in (bound, own):
        each.socket.close()


def test_clocks_of_two_machines_are_compared_by_the_shortest_trip():
    ours, theirs = RoundTrip(), RoundTrip()
    now, offset = 100.0, 5000.0  # their clock is ahead
    for way_s in (0.4, 0.01, 0.2):
        beat = ours.beat(now)
        now += way_s
        theirs.heard(beat.time, beat.echo, beat.held_s, now + offset)
        now += 0.3
        beat = theirs.beat(now + offset)
        now += way_s
        ours.heard(beat.time, beat.echo, beat.held_s, now)
        now += 0.1
    assert ours.num_measured == 3 and ours.least_s == pytest.approx(0.02)
    assert ours.clock_offset_s == pytest.approx(offset)
    assert theirs.num_measured == 2  # of its first it heard no echo
    ours.heard(1.0, now + 50.0, 0.0, now)  # an echo of what was never sent
    assert ours.num_measured == 3
