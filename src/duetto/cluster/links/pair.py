"""Two ends of a link in one process, for tests and for engines that share a process: each end has
a thread that does what came. It can be stopped, delayed and lost on purpose."""

from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread, current_thread
from time import sleep
from typing import NamedTuple

import numpy as np

from duetto.cluster.links.ending import CLOSED_HERE, EndOfLink
from duetto.cluster.links.link import (
    MAX_FRAME_BYTES,
    BlockRows,
    LinkLost,
    LinkUser,
    RowsSent,
)
from duetto.cluster.links.rows import copy_block_rows


class _HungUp(NamedTuple):
    reason: str


_Sent = tuple[RowsSent, BlockRows] | bytes | _HungUp


class PairedEnd:
    """One end. `delay_s`: how long each thing lies before this end sees it."""

    def __init__(self, user: LinkUser) -> None:
        self.delay_s = 0.0
        self.other: PairedEnd = self
        self._end = EndOfLink()
        self._end.user = user
        self._came: SimpleQueue[_Sent] = SimpleQueue()
        self._writing = Lock()
        self._is_half = False
        self._goes = Event()
        self._goes.set()
        self._thread = Thread(target=self._run, name="duetto-link", daemon=True)

    # --- of a link ----------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes; at most {MAX_FRAME_BYTES}")
        self._end.check()
        self.other._came.put(frame)

    def send_rows(self, rows: RowsSent, data: BlockRows) -> None:
        self._end.check()
        assert len(data.blocks) == rows.num_blocks, f"{rows}: not these blocks"
        copy = [np.empty((rows.num_blocks, array.shape[1]), np.uint8) for array in data.arrays]
        own = BlockRows(copy, np.arange(rows.num_blocks, dtype=np.int32))
        copy_block_rows(data, own)
        self.other._came.put((rows, own))

    def close(self) -> None:
        self._end.end(CLOSED_HERE, is_closed=True)
        if current_thread() is not self._thread:
            with self._writing:  # what is being written is not beyond this
                pass
        self._came.put(_HungUp(CLOSED_HERE))

    # --- on purpose ---------------------------------------------------------------------------

    def stop(self) -> None:
        """This end does nothing of what comes, as a process that was stopped."""
        self._goes.clear()

    def go_on(self) -> None:
        self._goes.set()

    def lose(self, reason: str, *, half: bool = False) -> None:
        """Both ends lose the link; `half`: this one alone does, and the other waits in vain."""
        self._is_half = half
        for end in (self,) if half else (self, self.other):
            end._end.end(reason)
            end._came.put(_HungUp(reason))

    # --- inside -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._end.is_over:
                sent = self._came.get()
                sleep(self.delay_s)
                self._goes.wait()
                self._do(sent)
        except LinkLost as loss:
            self._end.end(str(loss))
        except Exception as error:  # of its user
            self._end.end(f"who uses the link failed: {error!r:.200}")
        finally:
            self._goes.wait()
            if not self._is_half:  # what was sent before it still comes
                self.other._came.put(_HungUp("the other side closed the link, or is gone"))
            self._end.tell_lost()

    def _do(self, sent: _Sent) -> None:
        if isinstance(sent, bytes):
            self._end.received(sent)
        elif isinstance(sent, _HungUp):
            self._end.end(sent.reason)
        else:
            rows, data = sent
            places = self._end.places(rows, data.num_bytes)
            if places is not None:
                with self._writing:
                    if not self._end.is_over:
                        copy_block_rows(data, places)
                self._end.arrived(rows)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Whether its thread has ended; what came too late is let go."""
        self._thread.join(timeout)
        try:
            while not self._thread.is_alive():
                self._came.get_nowait()
        except Empty:
            pass
        return not self._thread.is_alive()


def link_pair(user_a: LinkUser, user_b: LinkUser) -> tuple[PairedEnd, PairedEnd]:
    """Two ends, each of its user."""
    a, b = PairedEnd(user_a), PairedEnd(user_b)
    a.other, b.other = b, a
    a.start()
    b.start()
    return a, b
