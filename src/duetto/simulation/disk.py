"""A disk for KV in virtual time: one thread that reads and writes while steps go on, and files that
stay within a number of bytes. The double of runner/tiers/disk.py and folder.py.

Reads come first. What is to be written is bounded, and refused beyond that. A job takes its bytes
over the bandwidth; nothing fails but what is no longer there. Knows keys and sizes; no contents.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from duetto.core.batch import BlockMove, MoveResult
from duetto.core.offloading import max_queued_bytes
from duetto.core.tenant_lru import TenantLru


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    max_bytes: int  # of all files; of a file its blocks count, and not its header
    read_bytes_per_s: float
    write_bytes_per_s: float


class _Job(NamedTuple):
    move: BlockMove
    time: float  # when it was asked for


class VirtualDisk:
    """Time is an argument, and never goes back."""

    def __init__(self, spec: DiskSpec, block_bytes: int) -> None:
        self._spec = spec
        self._block_bytes = block_bytes
        self._files = SimulatedFiles(spec.max_bytes, block_bytes)
        self._reads: deque[_Job] = deque()
        self._writes: deque[_Job] = deque()
        self._queued_bytes = 0  # to be written, the job under way included
        self._under_way: set[int] = set()  # moves without a result
        self._job: BlockMove | None = None  # the one that is being done ...
        self._begun = self._end = 0.0  # ... since and until when
        self._done: MoveResult | None = None  # what will be told of it
        self._results: list[MoveResult] = []
        self.read_s = self.write_s = 0.0  # of jobs that are done

    @property
    def num_dropped(self) -> int:
        """Blocks of files that had to go."""
        return self._files.num_dropped

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return self._files.num_bytes

    def has_room_for(self, num_blocks: int) -> bool:
        """Whether so much may be written now. A run that is larger than the whole queue may, when
        nothing else waits."""
        after = self._queued_bytes + num_blocks * self._block_bytes
        return not self._queued_bytes or after <= max_queued_bytes(self._block_bytes)

    def add(self, move: BlockMove, now: float) -> None:
        self.run(now)
        self._under_way.add(move.move_id)
        if move.source == "disk":
            self._reads.append(_Job(move, now))
        else:
            self._queued_bytes += len(move.keys) * self._block_bytes
            self._writes.append(_Job(move, now))
        self.run(now)

    def run(self, now: float) -> None:
        """What is done by `now`, and what has begun by then."""
        while True:
            if self._job is not None:
                if self._end > now:
                    return
                self._finish()
            if not self._reads and not self._writes:
                return
            self._begin((self._reads or self._writes).popleft())

    def take_results(self) -> list[MoveResult]:
        results, self._results = self._results, []
        return results

    def busy_s(self, now: float) -> float:
        """Seconds in which the thread had work, up to `now`, to which it has been run."""
        under_way = 0.0 if self._job is None else now - self._begun
        return self.read_s + self.write_s + under_way

    def wait(self, move_ids: Collection[int], now: float, timeout_s: float) -> float:
        """The instant at which one of these moves, of which some may be unknown, has a result, or
        at which the time is up."""
        known = self._under_way.intersection(move_ids)
        until = now + timeout_s if known else now
        while known and known <= self._under_way:
            if self._end > until:
                return until
            now = self._end
            self.run(now)
        return now

    def _begin(self, job: _Job) -> None:
        move, spec = job.move, self._spec
        is_read = move.source == "disk"
        num_done, error = self._files.read(move) if is_read else self._files.write(move)
        bandwidth = spec.read_bytes_per_s if is_read else spec.write_bytes_per_s
        seconds = num_done * self._block_bytes / bandwidth
        dropped = self._files.take_dropped()
        self._done = MoveResult(move.move_id, num_done, seconds, error, dropped)
        self._job, self._begun = move, max(self._end, job.time)
        self._end = self._begun + seconds

    def _finish(self) -> None:
        assert self._job is not None and self._done is not None
        if self._job.source == "disk":
            self.read_s += self._done.seconds
        else:
            self.write_s += self._done.seconds
            self._queued_bytes -= len(self._job.keys) * self._block_bytes
        self._under_way.remove(self._job.move_id)
        self._results.append(self._done)
        self._job = self._done = None


class SimulatedFiles:
    """Which blocks there are, in files that are called after their first block."""

    def __init__(self, max_bytes: int, block_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._block_bytes = block_bytes
        self._files = TenantLru[bytes]()
        self._keys_of: dict[bytes, tuple[bytes, ...]] = {}  # by file
        self._file_of: dict[bytes, bytes] = {}  # by key
        self._dropped: list[bytes] = []
        self.num_bytes = 0
        self.num_dropped = 0

    def read(self, move: BlockMove) -> tuple[int, str | None]:
        """How many of its blocks are there, from the first on; and why not all."""
        for index, key in enumerate(move.keys):
            if (name := self._file_of.get(key)) is None:
                return index, "it is not there"
            self._files.touch(name)
        return len(move.keys), None

    def write(self, move: BlockMove) -> tuple[int, str | None]:
        name, size = move.keys[0], len(move.keys) * self._block_bytes
        if size > self._max_bytes:
            return 0, f"{size} bytes of KV are more than it may have"
        if name in self._files:
            self._drop(name)
        while self.num_bytes + size > self._max_bytes and (oldest := self._files.victim()):
            self.num_dropped += len(self._keys_of[oldest])
            self._drop(oldest)
        self._files.add(name, move.tenant, size)
        self.num_bytes += size
        self._keys_of[name] = move.keys
        self._file_of.update(dict.fromkeys(move.keys, name))
        return len(move.keys), None

    def take_dropped(self) -> tuple[bytes, ...]:
        """Keys that are here no more, since this was asked last."""
        dropped, self._dropped = self._dropped, []
        return tuple([key for key in dropped if key not in self._file_of])

    def _drop(self, name: bytes) -> None:
        self.num_bytes -= self._files.remove(name)[1]
        for key in self._keys_of.pop(name):
            if self._file_of.get(key) == name:
                del self._file_of[key]
                self._dropped.append(key)
