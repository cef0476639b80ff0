"""Publishes KV events to whoever follows: ZeroMQ PUB, and a ROUTER that is asked for what was
missed. A thread of its own; the engine's only leaves events there, and never waits.

A request of the ROUTER is [empty, number]: the batches from that number on are answered, each as
[empty, number, payload], and last [empty, END, how many there were]. vLLM's publisher does the same
(its last part is empty). Who asks from `ALL` on is sent all that is published.
"""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple

import zmq

from duetto.cluster.address import (
    WireAddress,
    check_exposure_of,
    check_free,
    in_use,
    read_address,
)
from duetto.cluster.events.buffer import MAX_BATCHES, EventBuffer, SentBatch
from duetto.cluster.events.format import (
    ALL,
    END,
    EventWriter,
    MalformedEvents,
    read_seq,
    write_seq,
)
from duetto.cluster.secret import ClusterSecret, Gatekeeper, guard
from duetto.core.errors import ConfigError
from duetto.scheduler.block_pool import BlockPool
from duetto.scheduler.kv_events import BlocksCleared, BlocksStored, KVEvent, KVEventLog

logger = logging.getLogger(__name__)

EVENTS_FLAG = "--kv-events"
MAX_WAITING = 1_000_000  # hashes that the thread has not sent yet
MAX_REQUEST_BYTES = 2048  # what a CURVE connection begins with is longer than a request
LINGER_MS = 200
CLOSE_S = 5.0


class PublisherAddresses(NamedTuple):
    """Where a publisher listens, and how. Without `replay` nobody can ask for what was missed."""

    events: str
    replay: str | None = ""  # "": the port behind that of the events, or the path with .replay
    topic: str = ""
    connects: bool = False  # to who listens for the events of many
    int_hashes: bool = False
    is_open: bool = False  # others may listen, though there is no secret
    buffer_batches: int = MAX_BATCHES


class EventPublisher:
    """Of one pool. `publish` is for one thread, the engine's; the others may be called by any."""

    def __init__(
        self,
        addresses: PublisherAddresses,
        secret: ClusterSecret | None = None,
        *,
        flag: str = EVENTS_FLAG,
        first_seq: int | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Raises ConfigError for an address that cannot be used."""
        self._published: Callable[[], Sequence[bytes]] = tuple
        self._max_waiting = max_waiting
        # Numbers go on where no earlier start of the same worker has been: who follows sees a gap.
        first = time.time_ns() // 1000 if first_seq is None else first_seq
        writer = EventWriter(int_hashes=addresses.int_hashes)
        self._buffer = EventBuffer(writer, first, addresses.buffer_batches)
        self._topic = addresses.topic.encode()
        self._lock = Lock()  # guards the three below
        self._waiting: list[KVEvent] = [BlocksCleared()]  # of who was here before
        self._num_waiting = 1
        self._is_closing = False
        self.num_overflows = 0
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._context: zmq.Context[Any] = zmq.Context()
        self._pub, self._router = self._context.socket(zmq.PUB), self._context.socket(zmq.ROUTER)
        try:
            self._open(addresses, secret, flag)
        except BaseException:
            self._end()
            self._wake.close()
            raise
        self._thread = Thread(target=self._run, name="duetto-kv-events", daemon=True)
        self._thread.start()
        self._signal()

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.events}, missed ones at {self.replay}" if self.replay else self.events

    def follow(self, pool: BlockPool, block_size: int) -> None:
        """Publish what becomes of a pool's blocks, from here on. Before its engine runs."""
        log = KVEventLog(block_size, self.publish)
        self._published = log.published  # if this lags too far behind: all that is there
        pool.events = log

    def publish(self, events: Sequence[KVEvent]) -> None:
        """Leave events to be sent, in this order. Never waits for anybody."""
        with self._lock:
            was_empty = not self._waiting
            self._waiting += events
            self._num_waiting += sum(map(_num_hashes, events))
            if self._num_waiting > self._max_waiting:
                self._start_over(events)
        if was_empty:
            self._signal()

    def close(self) -> None:
        """Send what waits, and end."""
        with self._lock:
            self._is_closing = True
        self._signal()
        self._thread.join(CLOSE_S)
        self._wake.close()

    def _start_over(self, events: Sequence[KVEvent]) -> None:
        """Instead of all changes that wait, what has come of them."""
        sizes = [event.block_size for event in events if isinstance(event, BlocksStored)]
        self._waiting = [BlocksCleared()]
        there = tuple(self._published())
        if there:
            self._waiting.append(BlocksStored(there, None, (), sizes[0] if sizes else 1, False))
        self._num_waiting = 0  # as little as there can be
        self.num_overflows += 1
        logger.warning("KV events: the publisher lags behind; it starts over with all blocks")

    def _signal(self) -> None:
        with suppress(BlockingIOError):  # it is full: the thread will wake
            self._wake.send(b"\0")

    def _open(self, addresses: PublisherAddresses, secret: ClusterSecret | None, flag: str) -> None:
        events = read_address(addresses.events, flag, listens=not addresses.connects)
        replay = _replay_address(addresses, events, flag)
        for address in (events, replay):
            if address is not None and not addresses.is_open:
                check_exposure_of(address, flag, secret)
        if secret is not None:
            Gatekeeper(self._context, secret)
        self._pub.setsockopt(zmq.SNDHWM, addresses.buffer_batches)
        self._pub.setsockopt(zmq.LINGER, LINGER_MS)
        guard(self._pub, secret, listens=not addresses.connects)
        if addresses.connects:
            self._pub.connect(str(events))
            self.events = str(events)
        else:
            self.events = _bind(self._pub, events, flag)
        self._router.setsockopt(zmq.SNDHWM, 2 * addresses.buffer_batches)
        self._router.setsockopt(zmq.LINGER, LINGER_MS)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        guard(self._router, secret, listens=True)
        if replay is not None and replay.kind == "tcp" and not addresses.replay and events.port:
            replay = replay._replace(port=_port_of(self.events) + 1)
        self.replay = "" if replay is None else _bind(self._router, replay, flag)

    # --- on the publisher's thread -----------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        poller.register(self._router, zmq.POLLIN)
        try:
            while not self._is_closing:
                ready = dict(poller.poll())
                self._send_waiting()
                if self._router in ready:
                    self._answer(self._router.recv_multipart())
            self._send_waiting()
        except Exception:
            logger.exception("KV events: nothing is published any more")
        finally:
            self._end()

    def _end(self) -> None:
        self._pub.close()
        self._router.close()
        self._context.term()  # and so the gatekeeper's thread
        self._woken.close()

    def _send_waiting(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)  # first: who leaves something from here on wakes it again
        with self._lock:
            events, self._waiting, self._num_waiting = self._waiting, [], 0
        if events:
            for seq, payload in self._buffer.add(events, time.time()):
                self._pub.send_multipart((self._topic, write_seq(seq), payload))

    def _answer(self, request: list[bytes]) -> None:
        """Of what is no request nothing is said."""
        if len(request) != 3 or request[1]:
            return
        peer, _, wanted = request
        try:
            seq = read_seq(wanted)
        except MalformedEvents:
            return
        batches: Sequence[SentBatch]
        batches = [*self._buffer.all(time.time())] if seq == ALL else self._buffer.since(seq)
        for number, payload in batches:
            self._router.send_multipart((peer, b"", write_seq(number), payload))
        self._router.send_multipart((peer, b"", write_seq(END), write_seq(len(batches))))


def _num_hashes(event: KVEvent) -> int:
    return 1 if isinstance(event, BlocksCleared) else len(event.hashes)


def _replay_address(
    addresses: PublisherAddresses, events: WireAddress, flag: str
) -> WireAddress | None:
    """None: nobody can ask."""
    if addresses.replay:
        return read_address(addresses.replay, flag, listens=True)
    if addresses.replay is None or addresses.connects:
        return None
    if events.kind == "ipc":
        return read_address(f"{events}.replay", flag, listens=True)
    return events._replace(port=0)  # the next one, once it is known


def _bind(zmq_socket: "zmq.Socket[Any]", address: WireAddress, flag: str) -> str:
    """Where it listens."""
    check_free(address, flag)
    try:
        zmq_socket.bind(str(address))
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise in_use(address, flag) from None
        raise ConfigError(f"{flag} {address}: {error.strerror}") from None
    if address.kind == "ipc":
        Path(address.path).chmod(0o600)
    return zmq_socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
