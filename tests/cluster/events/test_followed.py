"""Publishers and subscribers over sockets, in this process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from cluster.events.vllm_events import ARRAYS

from duetto.cluster.events.format import ALL, END, read_events, read_seq, write_seq
from duetto.cluster.events.publisher import EventPublisher, PublisherAddresses
from duetto.cluster.events.rehash import HashedAs
from duetto.cluster.events.subscriber import EventSubscriber, Followed
from duetto.cluster.secret import ClusterSecret
from duetto.core.errors import ConfigError
from duetto.routing.prefix_index import PrefixIndex
from duetto.scheduler.block_pool import next_hash, root_hash
from duetto.scheduler.kv_events import BlocksCleared, BlocksRemoved, BlocksStored

DEADLINE_S = 20.0
ANY = "tcp://127.0.0.1:*"
A, B, C, D = (bytes([letter]) * 32 for letter in b"ABCD")


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it does not come to be"
        time.sleep(0.005)


def stored(*hashes: bytes) -> BlocksStored:
    return BlocksStored(hashes, None, tuple(range(len(hashes))), 1, False)


@contextmanager
def publishing(address: str = ANY, **options: Any) -> Iterator[EventPublisher]:
    secret = options.pop("secret", None)
    first_seq, max_waiting = options.pop("first_seq", None), options.pop("max_waiting", 10**6)
    publisher = EventPublisher(
        PublisherAddresses(address, **options),
        secret,
        first_seq=first_seq,
        max_waiting=max_waiting,
    )
    try:
        yield publisher
    finally:
        publisher.close()
        assert not publisher._thread.is_alive()


@contextmanager
def following(
    index: PrefixIndex, secret: ClusterSecret | None = None, **times: float
) -> Iterator[EventSubscriber]:
    subscriber = EventSubscriber(index, secret, **{"check_s": 0.2, "answer_s": 0.5} | times)
    try:
        yield subscriber
    finally:
        subscriber.close()
        assert not subscriber._thread.is_alive()


def of(publisher: EventPublisher, worker: str = "w", **options: Any) -> Followed:
    return Followed(worker, publisher.events, publisher.replay, **options)


def test_two_who_follow_see_what_was_and_what_comes():
    first, second = PrefixIndex(), PrefixIndex()
    with publishing() as publisher, following(first) as one, following(second) as other:
        publisher.publish([stored(A, B)])
        one.follow(of(publisher))
        wait_for(lambda: first.holding("w") == {A, B})
        publisher.publish([BlocksRemoved((B,)), stored(C)])
        other.follow(of(publisher, "late"))  # later: from all that is there
        wait_for(lambda: first.holding("w") == {A, C})
        wait_for(lambda: second.holding("late") == {A, C})
        publisher.publish([BlocksCleared(), stored(D)])
        wait_for(lambda: first.holding("w") == {D} == second.holding("late"))
        one.unfollow("w")
        wait_for(lambda: first.holding("w") == set())


def test_over_a_unix_socket_with_a_secret(tmp_path: Path):
    secret = ClusterSecret(b"a secret that all of us share")
    index, other = PrefixIndex(), PrefixIndex()
    with (
        publishing(f"ipc://{tmp_path}/events", secret=secret) as publisher,
        following(index, secret) as subscriber,
        following(other, ClusterSecret(b"another secret of somebody")) as stranger,
    ):
        assert publisher.replay == f"ipc://{tmp_path}/events.replay"
        publisher.publish([stored(A)])
        stranger.follow(of(publisher))
        subscriber.follow(of(publisher))
        wait_for(lambda: index.holding("w") == {A})
        publisher.publish([stored(B)])
        wait_for(lambda: index.holding("w") == {A, B})
        assert other.holding("w") == set()


def test_what_was_missed_is_asked_for_though_nothing_comes_any_more():
    """A publisher that is in the middle of its life, of which nothing is heard."""
    index = PrefixIndex()
    with publishing() as publisher, following(index) as subscriber:
        silent = of(publisher)._replace(topic="nothing has this topic")
        subscriber.follow(silent)
        publisher.publish([stored(A)])
        wait_for(lambda: index.holding("w") == {A})
        publisher.publish([stored(B), BlocksRemoved((A,))])
        wait_for(lambda: index.holding("w") == {B})


@pytest.mark.parametrize("goes_back", [False, True])
def test_a_worker_that_starts_again_begins_with_nothing(tmp_path: Path, goes_back):
    index, address = PrefixIndex(), f"ipc://{tmp_path}/events"
    with following(index) as subscriber:
        with publishing(address, first_seq=1000) as publisher:
            publisher.publish([stored(A)])
            subscriber.follow(of(publisher))
            wait_for(lambda: index.holding("w") == {A})
            publisher.publish([stored(B)])
            wait_for(lambda: index.holding("w") == {A, B})
        with publishing(address, first_seq=10 if goes_back else 5000) as publisher:

            def is_seen() -> bool:
                if goes_back:  # it is by what comes live that one sees it
                    publisher.publish([BlocksRemoved((C,))])
                    publisher.publish([stored(C)])
                    time.sleep(0.01)
                return index.holding("w") == {C}

            publisher.publish([stored(C)])
            wait_for(is_seen)


def test_a_publisher_that_lags_behind_starts_over_with_all():
    index = PrefixIndex()
    with publishing(max_waiting=100) as publisher:
        publisher._published = lambda: [A, B]
        many = [number.to_bytes(32, "big") for number in range(200)]
        publisher.publish([stored(*many), BlocksRemoved(tuple(many)), stored(A, B)])
        assert publisher.num_overflows == 1
        with following(index) as subscriber:
            subscriber.follow(of(publisher))
            wait_for(lambda: index.holding("w") == {A, B})


class FakeVLLM:
    """What vLLM's publisher does, in a few lines."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.pub = self.context.socket(zmq.PUB)
        self.router = self.context.socket(zmq.ROUTER)
        for opened in (self.pub, self.router):
            opened.setsockopt(zmq.LINGER, 0)
            opened.bind(ANY)
        self.buffer: list[tuple[bytes, bytes]] = []

    def publish(self, *events: Any) -> None:
        batch = ARRAYS["KVEventBatch"](time.time(), list(events), 0)
        message = (len(self.buffer)).to_bytes(8, "big"), msgspec.msgpack.encode(batch)
        self.buffer.append(message)
        self.pub.send_multipart((b"kv@pod@model", *message))

    def serve(self) -> None:
        while self.router.poll(0):
            peer, empty, start = self.router.recv_multipart()
            assert empty == b""
            for seq, payload in self.buffer:
                if int.from_bytes(seq, "big") >= int.from_bytes(start, "big"):
                    self.router.send_multipart((peer, b"", seq, payload))
            self.router.send_multipart((peer, b"", (-1).to_bytes(8, "big", signed=True), b""))

    def close(self) -> None:
        self.context.destroy(linger=0)


def test_vllms_workers_are_followed_by_their_tokens():
    """Whose hashes are numbers that nobody here can compute."""
    stored_, removed = ARRAYS["BlockStored"], ARRAYS["BlockRemoved"]
    ours = HashedAs(b"a model", 2)
    first = next_hash(root_hash(b"a model", b""), [1, 2])
    second, other = next_hash(first, [3, 4]), next_hash(root_hash(b"a model", b""), [9, 9])
    index, vllm = PrefixIndex(), FakeVLLM()
    try:
        vllm.publish(stored_([11, 12], None, [1, 2, 3, 4], 2, None, "GPU", None))
        with following(index) as subscriber:
            addresses = [s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (vllm.pub, vllm.router)]
            subscriber.follow(Followed("v", *addresses, topic="kv@", hashed_as=ours))

            def serve_until(expected: set[bytes]) -> None:
                def is_so() -> bool:
                    vllm.serve()
                    return index.holding("v") == expected

                wait_for(is_so)

            serve_until({first, second})
            vllm.publish(
                removed([12], "GPU"),
                stored_([13], None, [9, 9], 2, None, "GPU", None),
                stored_([14], None, [9, 9], 2, 3, "GPU", "an adapter"),
                stored_([15], 99, [9, 9], 2, None, "GPU", None),  # after what is not known
                stored_([16], None, [9], 1, None, "GPU", None),  # of another size
                stored_([17], None, [8, 8], 2, None, "CPU", None),
            )
            serve_until({first, other})
            vllm.publish(stored_([12], 11, [3, 4], 2, None, "GPU", None))
            serve_until({first, second, other})
            state = subscriber.state("v")
            assert state is not None
            assert state.problem == ""
    finally:
        vllm.close()


def test_a_client_of_vllms_reads_us():
    """As vLLM's own example of a subscriber does: SUB, and REQ for what it missed."""
    with publishing(topic="kv@pod@model", first_seq=7, int_hashes=True) as publisher:
        context: zmq.Context[Any] = zmq.Context()
        sub, req = context.socket(zmq.SUB), context.socket(zmq.REQ)
        try:
            sub.setsockopt(zmq.SUBSCRIBE, b"kv@")
            sub.connect(publisher.events)
            req.connect(publisher.replay)
            req.send((0).to_bytes(8, "big"))
            assert req.poll(1000 * DEADLINE_S)
            seq, payload = req.recv_multipart()
            assert int.from_bytes(seq, "big") == 7
            decoder = msgspec.msgpack.Decoder(ARRAYS["KVEventBatch"])
            assert decoder.decode(payload).events == [ARRAYS["AllBlocksCleared"]()]
            number = 0
            while not sub.poll(20):  # until it is connected
                number += 1
                assert number < 50 * DEADLINE_S
                publisher.publish([stored(A)])
            topic, seq, payload = sub.recv_multipart()
            assert (topic, len(seq)) == (b"kv@pod@model", 8)
            event = decoder.decode(payload).events[0]
            assert event == ARRAYS["BlockStored"](
                [int.from_bytes(A[:8], "big")], None, [0], 1, None, "GPU", None
            )
        finally:
            context.destroy(linger=0)


def test_what_is_no_request_is_not_answered_and_nobody_minds():
    with publishing() as publisher:
        context: zmq.Context[Any] = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        try:
            dealer.connect(publisher.replay)
            for parts in ([b""], [b"", b"short"], [b"x", write_seq(0)], [b"", b"", b"", b""]):
                dealer.send_multipart(parts)
            dealer.send_multipart([b"", write_seq(ALL)])
            assert dealer.poll(1000 * DEADLINE_S)
            empty, seq, payload = dealer.recv_multipart()
            assert read_events(payload).events == (BlocksCleared(),)
            empty, seq, payload = dealer.recv_multipart()
            assert (empty, read_seq(seq), read_seq(payload)) == (b"", END, 1)
            assert not dealer.poll(50)
        finally:
            context.destroy(linger=0)


@pytest.mark.parametrize("parts", [[b"no topic"], [b"", b"short", b""], [b"", write_seq(1), b"x"]])
def test_who_sends_what_is_no_batch_is_not_followed_any_more(parts):
    context: zmq.Context[Any] = zmq.Context()
    pub, index = context.socket(zmq.PUB), PrefixIndex()
    pub.bind(ANY)
    with publishing() as publisher, following(index) as subscriber:
        publisher.publish([stored(A)])
        subscriber.follow(of(publisher, "good"))
        subscriber.follow(Followed("bad", pub.getsockopt_string(zmq.LAST_ENDPOINT)))

        def is_given_up() -> bool:
            pub.send_multipart(parts)
            state = subscriber.state("bad")
            return state is not None and bool(state.problem)

        try:
            wait_for(is_given_up)
            wait_for(lambda: index.holding("good") == {A})  # and others are
        finally:
            context.destroy(linger=0)


def test_addresses_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path):
    with publishing() as publisher:
        taken = publisher.events
        for address, why in (
            (taken, "another program is using it"),
            ("tcp://0.0.0.0:5557", "there is no secret"),
            ("tcp://*:*", "there is no secret"),
            ("udp://127.0.0.1:1", "is no address"),
            (f"ipc://{tmp_path}/no/folder", "there is no folder"),
        ):
            with pytest.raises(ConfigError, match=why) as error:
                EventPublisher(PublisherAddresses(address))
            assert str(error.value).startswith("--kv-events")
            assert "\n" not in str(error.value)
    with publishing("tcp://*:*", is_open=True) as publisher:  # who says so
        assert publisher.events.startswith("tcp://0.0.0.0:")
    with following(PrefixIndex()) as subscriber:
        for address in ("tcp://10.1.2.3:5557", "nowhere"):
            with pytest.raises(ConfigError):
                subscriber.follow(Followed("w", address))
