"""The disk's thread: reads, writes and removes files of KV while steps go on.

Reads come first, as requests wait for them; then what is to be forgotten, before all that is to be
written. What is to be written is bounded in bytes, and refused beyond that. The thread starts with
the first job and ends when nothing has come for a while; at the end of the process what is still to
be written or forgotten is, for a few seconds. Knows no step.
"""

import atexit
import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Thread
from time import monotonic
from typing import NamedTuple

from duetto.backends.blocks import Bytes
from duetto.core.batch import BlockMove, MoveResult
from duetto.core.offloading import max_queued_bytes
from duetto.runner.tiers.folder import Folder

logger = logging.getLogger(__name__)

IDLE_S = 2.0  # after which the thread ends
LAST_S = 5.0  # for what is to be written at the end of the process


class _Job(NamedTuple):
    move: BlockMove
    rows: Sequence[Bytes]  # to read into
    blocks: Bytes | None  # to write
    forgotten: frozenset[bytes] = frozenset()  # keys that are not to be written after all

    @property
    def num_bytes(self) -> int:
        return 0 if self.blocks is None else self.blocks.nbytes


class DiskTier:
    """Moves to and from a Folder, each with a result in its time."""

    def __init__(
        self,
        folder: Folder,
        max_queued: int | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._folder = folder
        self._max_queued_bytes = max_queued or max_queued_bytes(folder.block_bytes)
        self._clock = clock
        self._changed = Condition()  # guards all below
        self._reads: deque[_Job] = deque()
        self._forgets: deque[_Job] = deque()
        self._writes: deque[_Job] = deque()
        self._queued_bytes = 0  # to be written, the job under way included
        self._under_way: set[int] = set()  # moves without a result
        self._results: list[MoveResult] = []
        self._is_running = False
        _flush_at_exit(self)

    @property
    def folder(self) -> Folder:
        """For who asks what is there, before the first move."""
        return self._folder

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether so much may be written now. A run that is larger than the whole queue may, when
        nothing else waits."""
        with self._changed:
            after = self._queued_bytes + num_bytes
            return not self._queued_bytes or after <= self._max_queued_bytes

    def write(self, move: BlockMove, blocks: Bytes) -> None:
        """`blocks` is the disk's own from now on."""
        self._add(_Job(move, (), blocks), self._writes)

    def read(self, move: BlockMove, rows: Sequence[Bytes]) -> None:
        """`rows` are the disk's own until the move has a result."""
        self._add(_Job(move, rows, None), self._reads)

    def forget(self, move: BlockMove) -> None:
        """These blocks are to be in no file, nor be written if they wait for it."""
        keys = frozenset(move.keys)
        with self._changed:
            waiting = [job._replace(forgotten=job.forgotten | keys) for job in self._writes]
            self._writes = deque(waiting)
            self._add(_Job(move, (), None), self._forgets)

    def take_results(self) -> list[MoveResult]:
        with self._changed:
            results, self._results = self._results, []
        return results

    def wait(self, move_ids: Sequence[int], timeout_s: float) -> None:
        """Until one of these moves, of which some may be unknown, has a result."""
        with self._changed:
            known = self._under_way.intersection(move_ids)
            if known:
                self._changed.wait_for(lambda: not known <= self._under_way, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything has a result; False if it has not by then."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, timeout_s)

    def _add(self, job: _Job, queue: deque[_Job]) -> None:
        with self._changed:
            queue.append(job)
            self._queued_bytes += job.num_bytes
            self._under_way.add(job.move.move_id)
            self._changed.notify_all()
            if not self._is_running:
                self._is_running = True
                Thread(target=self._run, name="duetto-kv-disk", daemon=True).start()

    # --- on the thread ---------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                result = self._do(job)
            except Exception as error:  # a miss, and not the end of the thread
                logger.exception("moving KV to or from %s failed", self._folder.path)
                result = MoveResult(job.move.move_id, 0, error=repr(error))
            with self._changed:
                self._queued_bytes -= job.num_bytes
                self._under_way.remove(job.move.move_id)
                self._results.append(result)
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: any(self._in_order()), IDLE_S)
            for queue in self._in_order():
                if queue:
                    return queue.popleft()
            self._is_running = False
            return None

    def _in_order(self) -> tuple[deque[_Job], ...]:
        return self._reads, self._forgets, self._writes

    def _do(self, job: _Job) -> MoveResult:
        start, keys = self._clock(), job.move.keys
        if job.move.target == "nowhere":
            error = self._folder.forget(keys)
            num_done = 0 if error else len(keys)
        elif job.blocks is None:
            num_done, error = self._folder.read(keys, job.rows)
        else:
            error = self._write(job, job.blocks)
            num_done = 0 if error else len(keys)
        seconds = self._clock() - start
        dropped = self._folder.take_dropped()
        return MoveResult(job.move.move_id, num_done, seconds, error, dropped)

    def _write(self, job: _Job, blocks: Bytes) -> str | None:
        keys = job.move.keys
        wanted = [index for index, key in enumerate(keys) if key not in job.forgotten]
        if not wanted:
            return None
        if len(wanted) < len(keys):
            keys, blocks = tuple([keys[index] for index in wanted]), blocks[wanted]
        return self._folder.write(keys, blocks, job.move.tenant)


def _flush_at_exit(disk: DiskTier) -> None:
    """Without keeping it alive."""
    reference = weakref.ref(disk)

    def flush() -> None:
        if (there := reference()) is not None:
            there.flush(LAST_S)

    atexit.register(flush)
    weakref.finalize(disk, atexit.unregister, flush).atexit = False
