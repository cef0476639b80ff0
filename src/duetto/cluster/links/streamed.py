"""One end of a link made of a control channel and carriers of rows.

Its threads: one for frames, heartbeats and the end; one for what each carrier brings. Knows no
socket and no shared memory.
"""

import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from select import POLLIN, POLLOUT, poll
from threading import Condition, Event, Lock, Thread, get_ident
from time import monotonic
from typing import NamedTuple

from duetto.cluster.links.carriers import Carrier
from duetto.cluster.links.channel import GONE, LinkChannel
from duetto.cluster.links.ending import CLOSED_HERE, EndOfLink
from duetto.cluster.links.headers import (
    HEARTBEAT,
    ControlParser,
    SentFrame,
    SentPart,
    frame_message,
    part_header,
    part_in_header,
)
from duetto.cluster.links.link import (
    MAX_FRAME_BYTES,
    BlockRows,
    LinkLost,
    LinkUser,
    RowsSent,
)
from duetto.cluster.links.rows import check_rows

MAX_WAITING_BYTES = 16 << 20  # of frames: not taken by the other side, or before their rows
BEATS = 4  # heartbeats in the time after which silence is death


class Patience(NamedTuple):
    """How long each side takes silence."""

    own_s: float
    theirs_s: float


class StreamedEnd:
    """As LinkEnd. Begins with `start`."""

    def __init__(
        self, control: LinkChannel, carriers: Sequence[Carrier], patience: Patience
    ) -> None:
        self._control, self._carriers = control, carriers
        self._dead_after_s = patience.own_s
        self._beat_s = min(patience) / BEATS
        self._parser = ControlParser(len(carriers))
        self._waker = os.pipe()
        for descriptor in self._waker:
            os.set_blocking(descriptor, False)
        self._sending_rows = Lock()
        self._num_sent = [0] * len(carriers)  # parts
        self._next_carrier = 0
        self._sending = Lock()  # frames
        self._unsent: deque[memoryview] = deque()
        self._num_unsent_bytes = 0
        self._num_frames_sent = 0
        self._last_sent = monotonic()
        self._coming = Condition()
        self._num_arrived = [0] * len(carriers)
        self._num_frames = 0  # told to the user
        self._waiting: deque[SentFrame] = deque()  # for rows before them
        self._writing = [Lock() for _ in carriers]
        self._is_closed = False
        self._has_carrier_ended = False
        self._heard = self._moved = monotonic()
        self._closing = Lock()

        self._end = EndOfLink()
        self._threads = [
            Thread(target=self._carry, args=(number,), name="duetto-link-rows", daemon=True)
            for number in range(len(carriers))
        ]
        self._thread = Thread(target=self._run, name="duetto-link", daemon=True)
        self._has_ended = Event()

    def start(self, user: LinkUser) -> None:
        """Once. It may have been closed already."""
        self._end.user = user
        for thread in (*self._threads, self._thread):
            thread.start()

    def abandon(self) -> None:
        """Instead of `start`: nobody uses it."""
        self._end.end(CLOSED_HERE, is_closed=True)
        self._threads = []
        self._let_go()

    # --- to the other side --------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Never waits: what does not go now goes from the link's own thread."""
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes; at most {MAX_FRAME_BYTES}")
        self._end.check()
        with self._sending:
            self._num_frames_sent += 1
            self._queue(frame_message(tuple(self._num_sent), frame))

    def send_rows(self, rows: RowsSent, data: BlockRows) -> None:
        """Parts go to one carrier after the other."""
        assert len(data.blocks) == rows.num_blocks, f"{rows}: not these blocks"
        check_rows(data)
        at_a_time = max(1, self._carriers[0].part_bytes // data.block_bytes)
        try:
            with self._sending_rows:
                for first in range(0, rows.num_blocks, at_a_time):
                    self._end.check()
                    self._send_part(rows, first, data.part(first, at_a_time))
        except (LinkLost, OSError) as error:
            self._lose(error)
            self._end.check()
        except BaseException as error:  # a part that is sent by half
            self._lose(LinkLost(f"rows were not sent: {error!r:.200}"))
            raise

    def _send_part(self, rows: RowsSent, first: int, data: BlockRows) -> None:
        number = self._next_carrier
        self._next_carrier = (number + 1) % len(self._carriers)
        own = rows._replace(first=rows.first + first, num_blocks=len(data.blocks))
        header = part_header(SentPart(own, self._num_frames_sent, data.num_bytes))
        self._carriers[number].send_part(header, data)
        self._num_sent[number] += 1

    def _queue(self, message: bytes) -> None:
        """With `_sending` held."""
        self._unsent.append(memoryview(message))
        self._num_unsent_bytes += len(message)
        try:
            self._flush()
            if self._num_unsent_bytes > MAX_WAITING_BYTES:
                raise LinkLost("the other side does not take what is sent to it")
        except (LinkLost, OSError) as error:
            self._lose(error)
            self._end.check()
        if self._unsent:
            self._wake()

    def _flush(self) -> None:
        while self._unsent and not self._is_closed:
            data = self._unsent[0]
            sent = self._control.send_now(data)
            if sent == 0:
                return
            self._num_unsent_bytes -= sent
            self._last_sent = monotonic()
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = data[sent:]

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        self._end.end(CLOSED_HERE, is_closed=True)
        self._hang_up()
        own = get_ident()
        for lock, thread in zip(self._writing, self._threads, strict=True):
            if thread.ident != own:  # what is being written is not beyond this
                with lock:
                    pass

    def join(self, timeout: float) -> bool:
        """Whether all has ended that was its, as it soon does after its end."""
        return self._has_ended.wait(timeout)

    def _lose(self, error: Exception) -> None:
        is_gone = isinstance(error, ConnectionError)
        self._end.end(GONE if is_gone else _in_words(error))
        self._hang_up()

    def _hang_up(self) -> None:
        with self._closing:
            if not self._is_closed:
                self._control.hang_up()
                for carrier in self._carriers:
                    carrier.hang_up()
        self._wake()

    def _wake(self) -> None:
        with self._closing, suppress(BlockingIOError):
            if not self._is_closed:
                os.write(self._waker[1], b"\0")

    def _let_go(self) -> None:
        """Nobody is inside any more: files and sockets can be given back."""
        for thread in self._threads:
            thread.join()
        with self._sending_rows, self._sending, self._closing:
            self._is_closed = True
            self._control.close()
            for carrier in self._carriers:
                carrier.close()
            for descriptor in self._waker:
                os.close(descriptor)

    # --- from the other side ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._lose(error)
        finally:
            self._hang_up()
            with self._coming:
                self._coming.notify_all()
            self._let_go()
            self._end.tell_lost()
            self._has_ended.set()

    def _serve(self) -> None:
        poller = poll()
        poller.register(self._waker[0], POLLIN)
        self._heard = self._moved = monotonic()
        while not self._end.is_over:
            wanted = POLLIN | (POLLOUT if self._unsent else 0)
            poller.register(self._control.fileno(), wanted)
            poller.poll(max(1, int(self._beat_s * 1000)))
            with suppress(BlockingIOError):
                os.read(self._waker[0], 4096)
            has_ended = self._has_carrier_ended
            self._read()
            self._tell_frames()
            self._check_life()
            if has_ended:
                raise LinkLost(GONE)
            with self._sending:
                if monotonic() - self._last_sent >= self._beat_s and not self._unsent:
                    self._queue(HEARTBEAT)
                self._flush()

    def _read(self) -> None:
        data = memoryview(bytearray(1 << 16))
        while not self._end.is_over:
            came = self._control.receive_now(data)
            if came is None:
                return
            if came == 0:
                self._tell_frames()  # of what came before the end
                raise LinkLost(GONE)
            self._heard = monotonic()
            frames = self._parser.feed(bytes(data[:came]))
            self._waiting.extend(frames)
            if sum([len(one.frame) for one in self._waiting]) > MAX_WAITING_BYTES:
                raise LinkLost("the other side sends frames and not the rows before them")

    def _tell_frames(self) -> None:
        while self._waiting and self._have_come(self._waiting[0].counts):
            self._end.received(self._waiting.popleft().frame)
            with self._coming:
                self._num_frames += 1
                self._coming.notify_all()
            self._moved = monotonic()

    def _have_come(self, counts: tuple[int, ...]) -> bool:
        return all(have >= count for have, count in zip(self._num_arrived, counts, strict=True))

    def _check_life(self) -> None:
        now = monotonic()
        if now - self._heard > self._dead_after_s:
            raise LinkLost(f"the other side was silent for {self._dead_after_s:g} s")
        if self._waiting and now - self._moved > self._dead_after_s:
            raise LinkLost(f"rows before a frame did not come within {self._dead_after_s:g} s")

    def _carry(self, number: int) -> None:
        try:
            while self._take_part(number):
                self._moved = monotonic()
                self._num_arrived[number] += 1
                if self._waiting:
                    self._wake()
        except Exception as error:
            self._lose(error)
        self._has_carrier_ended = True  # so has the control channel, or it will see this
        self._wake()

    def _take_part(self, number: int) -> bool:
        carrier = self._carriers[number]
        header = carrier.receive_header()
        if header is None:
            return False
        rows, num_frames, num_bytes = part_in_header(header)
        self._wait_for_frames(num_frames)
        places = self._end.places(rows, num_bytes)
        if places is None:
            carrier.drop_rows(num_bytes)
            return True
        with self._writing[number]:
            self._end.check()
            carrier.receive_rows(places)
        self._end.arrived(rows)
        return True

    def _wait_for_frames(self, num_frames: int) -> None:
        """Those that were sent before rows. (The control thread sees that it ends.)"""
        with self._coming:
            came = self._coming.wait_for(
                lambda: self._num_frames >= num_frames or self._end.is_over, self._dead_after_s
            )
        if not came:
            raise LinkLost(f"frames before rows did not come within {self._dead_after_s:g} s")
        self._end.check()


def _in_words(error: Exception) -> str:
    if isinstance(error, LinkLost):
        return str(error)
    if isinstance(error, TimeoutError | BlockingIOError):
        return "the other side does not answer"
    return f"the link failed: {error!r:.200}"
