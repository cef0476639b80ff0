"""Follows the KV events of many workers, on one thread, and keeps an index of their blocks.

Each worker has a SUB, and a DEALER that asks what was missed. What a worker sends is untrusted: it
is bounded, and who sends what is no batch is not followed any more. It is also asked now and then
whether something was missed, since the last batch may be.
"""

import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, Thread
from typing import Any, NamedTuple

import zmq

from duetto.cluster.address import check_exposure_of, read_address
from duetto.cluster.events.format import MAX_PAYLOAD_BYTES, MalformedEvents, read_seq, write_seq
from duetto.cluster.events.rehash import HashedAs, RehashingSink
from duetto.cluster.events.stream import BatchStream, BlockIndex, DirectSink, EventSink
from duetto.cluster.facts import WorkerFacts
from duetto.cluster.secret import ClusterSecret, guard
from duetto.core.errors import ConfigError

logger = logging.getLogger(__name__)

CHECK_S = 5.0  # so often a worker is asked whether something was missed
ANSWER_S = 5.0  # so long nothing may come of an answer
MAX_TOPIC_BYTES = 1024
MAX_AT_ONCE = 256  # batches of one worker before others have their turn
MAX_QUEUED = 2_000  # batches in a socket; what is lost then is asked for
CLOSE_S = 5.0


class Followed(NamedTuple):
    """A worker, and where it publishes."""

    worker: str
    events: str
    replay: str = ""  # "": it cannot be asked
    topic: str = ""
    hashed_as: HashedAs | None = None  # its hashes are not ours: they are made from its tokens
    is_open: bool = False  # it may be beyond this machine, though there is no secret


class FollowedState(NamedTuple):
    """For people."""

    num_batches: int
    num_gaps: int
    num_snapshots: int
    num_restarts: int
    is_asking: bool
    problem: str = ""


class _Line:
    """The sockets of one worker, and what its stream wants of them."""

    def __init__(
        self,
        context: "zmq.Context[Any]",
        secret: ClusterSecret | None,
        followed: Followed,
        sink: EventSink,
        now: float,
    ) -> None:
        self.followed = followed
        self.stream = BatchStream(sink, may_ask=bool(followed.replay))
        self.problem = ""
        self.dealer: zmq.Socket[Any] | None = None
        self.last_time = now  # when something came, or was asked
        self._context, self._secret = context, secret
        self._num_asked = 0
        self._is_answered = True
        self.sub = context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.SUBSCRIBE, followed.topic.encode())
        self.sub.setsockopt(zmq.RCVHWM, MAX_QUEUED)
        self._connect(self.sub, followed.events)

    def _connect(self, opened: "zmq.Socket[Any]", address: str) -> None:
        opened.setsockopt(zmq.LINGER, 0)
        opened.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
        guard(opened, self._secret, listens=False)
        opened.connect(address)

    def read(self, now: float) -> None:
        """What has been published, some of it. Raises MalformedEvents."""
        for _ in range(MAX_AT_ONCE):
            parts = _received(self.sub)
            if parts is None:
                return
            self.last_time = now
            if len(parts) != 3 or len(parts[0]) > MAX_TOPIC_BYTES:
                raise MalformedEvents(f"a message of {len(parts)} parts, not of 3")
            self.stream.heard(read_seq(parts[1]), parts[2])

    def read_answers(self, now: float) -> None:
        """Raises MalformedEvents."""
        for _ in range(MAX_AT_ONCE):
            parts = None if self.dealer is None else _received(self.dealer)
            if parts is None:
                return
            self.last_time = now
            if len(parts) != 3 or parts[0]:
                raise MalformedEvents(f"an answer of {len(parts)} parts, not of 3")
            num_asked = self.stream.num_asked
            self.stream.answered(read_seq(parts[1]), parts[2])
            self._is_answered = self.stream.asking is None or self.stream.num_asked > num_asked

    def ask(self, poller: zmq.Poller) -> None:
        """Send what the stream wants to ask."""
        if self.stream.num_asked == self._num_asked or self.stream.asking is None:
            return
        self._num_asked = self.stream.num_asked
        if not self._is_answered:
            self.hang_up(poller)
        if self.dealer is None:
            self.dealer = self._context.socket(zmq.DEALER)
            self.dealer.setsockopt(zmq.RCVHWM, MAX_QUEUED)
            self._connect(self.dealer, self.followed.replay)
            poller.register(self.dealer, zmq.POLLIN)
        with suppress(zmq.Again):  # then nothing comes, and it is asked again
            self.dealer.send_multipart((b"", write_seq(self.stream.asking)), zmq.NOBLOCK)
        self._is_answered = False

    def hang_up(self, poller: zmq.Poller) -> None:
        """Whatever else is answered is not wanted."""
        if self.dealer is not None:
            poller.unregister(self.dealer)
            self.dealer.close()
            self.dealer = None

    @property
    def state(self) -> FollowedState:
        stream = self.stream
        return FollowedState(
            stream.num_batches,
            stream.num_gaps,
            stream.num_snapshots,
            stream.num_restarts,
            stream.asking is not None and not self.problem,
            self.problem,
        )


class EventSubscriber:
    """Any thread may call; the index is changed on the subscriber's own."""

    def __init__(
        self,
        index: BlockIndex,
        secret: ClusterSecret | None = None,
        *,
        check_s: float = CHECK_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._index = index
        self._secret = secret
        self._check_s, self._answer_s = check_s, answer_s
        self._context: zmq.Context[Any] = zmq.Context()
        self._lock = Lock()  # guards the two below
        self._orders: deque[Callable[[], None]] = deque()
        self._is_closing = False
        self._lines: dict[str, _Line] = {}
        self._by_socket: dict[Any, _Line] = {}
        self._poller = zmq.Poller()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._thread = Thread(target=self._run, name="duetto-kv-index", daemon=True)
        self._thread.start()

    def follow(self, followed: Followed) -> None:
        """Keep a worker's blocks in the index. Raises ConfigError for what is no address, or one
        beyond this machine without a secret."""
        for address in (followed.events, followed.replay):
            if address:
                flag = f"worker {followed.worker}: events from"
                read = read_address(address, flag, listens=False)
                if not followed.is_open:
                    check_exposure_of(read, flag, self._secret)
        self._order(lambda: self._begin(followed))

    def joined(self, facts: WorkerFacts) -> None:
        """Follow a worker, if it says that it publishes, and where."""
        if facts.events:
            followed = Followed(facts.worker_id, facts.events, facts.replay)
            try:
                self.follow(followed)
            except ConfigError as error:
                logger.warning("KV events: %s", error)

    def left(self, worker_id: str) -> None:
        self.unfollow(worker_id)

    def unfollow(self, worker: str) -> None:
        """Forget a worker, and its blocks."""
        self._order(lambda: self._end(worker))

    def state(self, worker: str) -> FollowedState | None:
        """None: it is not followed, or not yet."""
        line = self._lines.get(worker)
        return None if line is None else line.state

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
        self._signal()
        self._thread.join(CLOSE_S)
        self._wake.close()

    def _order(self, order: Callable[[], None]) -> None:
        with self._lock:
            self._orders.append(order)
        self._signal()

    def _signal(self) -> None:
        with suppress(BlockingIOError):
            self._wake.send(b"\0")

    # --- on the subscriber's thread ----------------------------------------------------------

    def _run(self) -> None:
        self._poller.register(self._woken, zmq.POLLIN)
        pause_ms = max(1, int(1000 * min(self._check_s, self._answer_s) / 4))
        last_look = time.monotonic()
        try:
            while not self._is_closing:
                ready = self._poller.poll(pause_ms)
                now = time.monotonic()
                for opened, _ in ready:
                    line = self._by_socket.get(opened)
                    if line is not None:
                        self._attend(line, now)
                self._obey()
                if now - last_look >= pause_ms / 1000:
                    last_look = now
                    self._look(now)
        except Exception:
            logger.exception("KV events: nobody is followed any more")
        finally:
            for worker in [*self._lines]:
                self._end(worker)
            self._context.term()
            self._woken.close()

    def _obey(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)
        with self._lock:
            orders = [*self._orders]
            self._orders.clear()
        for order in orders:
            order()

    def _look(self, now: float) -> None:
        """Who is quiet is asked whether it is; who does not answer is asked again."""
        for line in self._lines.values():
            quiet_s = now - line.last_time
            if line.problem:
                continue
            if line.stream.asking is not None and quiet_s >= self._answer_s:
                line.last_time = now
                line.stream.ask_again()
            elif line.stream.asking is None and quiet_s >= self._check_s:
                line.last_time = now
                line.stream.check()
            self._ask(line)

    def _attend(self, line: _Line, now: float) -> None:
        try:
            line.read(now)
            line.read_answers(now)
        except MalformedEvents as error:
            self._give_up(line, str(error))
        else:
            self._ask(line)

    def _ask(self, line: _Line) -> None:
        before = line.dealer
        line.ask(self._poller)
        if line.dealer is not before:
            self._by_socket.pop(before, None)
            self._by_socket[line.dealer] = line

    def _begin(self, followed: Followed) -> None:
        self._end(followed.worker)
        sink: EventSink = DirectSink(followed.worker, self._index)
        if followed.hashed_as is not None:
            sink = RehashingSink(followed.worker, self._index, followed.hashed_as)
        line = _Line(self._context, self._secret, followed, sink, time.monotonic())
        self._lines[followed.worker] = self._by_socket[line.sub] = line
        self._poller.register(line.sub, zmq.POLLIN)
        self._ask(line)

    def _give_up(self, line: _Line, problem: str) -> None:
        """Its blocks are not known any more; it may still be sent requests."""
        line.problem = problem
        logger.warning("KV events of worker %s: %s", line.followed.worker, problem)
        self._hang_up(line)
        self._index.left(line.followed.worker)

    def _end(self, worker: str) -> None:
        line = self._lines.pop(worker, None)
        if line is not None:
            self._hang_up(line)
            self._index.left(worker)

    def _hang_up(self, line: _Line) -> None:
        if line.sub.closed:
            return
        self._by_socket.pop(line.sub)
        self._by_socket.pop(line.dealer, None)
        self._poller.unregister(line.sub)
        line.sub.close()
        line.hang_up(self._poller)


def _received(opened: "zmq.Socket[Any]") -> list[bytes] | None:
    try:
        return opened.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
