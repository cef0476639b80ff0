"""KV tiers in virtual time: the scheduler that ships decides every move, and a double of what does
them (runner/tiers/mover.py) spends time on it.

A copy between the arena and RAM takes its bytes over a bandwidth, inside the step. What goes to the
disk is copied inside the step, and written behind it; what comes from there is read behind steps.
Knows block numbers and bytes; not why something is moved.
"""

from dataclasses import dataclass

from duetto.core.batch import BlockMove, MoveResult, ScheduledBatch, StepOutput
from duetto.core.executor import Done, Executor
from duetto.core.offloading import WAIT_S
from duetto.core.shape import StepTime
from duetto.scheduler.tiers import Tiers, TierSizes
from duetto.simulation.disk import DiskSpec, VirtualDisk
from duetto.simulation.virtual_clock import VirtualClock

BEHIND = "the disk is behind with what is to be written"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """What one replica has for KV beside its arena."""

    num_ram_blocks: int
    block_bytes: int  # of all its devices
    copy_bytes_per_s: float  # between the arena and RAM, of all its devices
    disk: DiskSpec | None = None

    def tiers(self, block_size: int, step_time: StepTime) -> Tiers:
        """What decides: as a server has it, with the very price of a step."""
        sizes = TierSizes(self.num_ram_blocks, self.disk is not None)
        return Tiers(sizes, block_size, step_time=step_time)


@dataclass(slots=True)
class MoveCounts:
    """What moves did, since the start. Blocks, but for seconds."""

    num_dropped: int = 0  # fell out of RAM for others
    num_refused: int = 0  # not written, as the disk was behind
    num_from_ram: int = 0  # loaded into the arena, that were last copied to RAM from there ...
    num_from_disk: int = 0  # ... or came to RAM from the disk for this
    num_ram_hits: int = 0  # of the former, those for requests at their first admission
    num_disk_hits: int = 0  # of the latter
    copy_s: float = 0.0  # inside steps
    exposed_s: float = 0.0  # of the disk's, while no step was computed
    waited_s: float = 0.0  # with nothing to compute before the disk had read


class MovingExecutor:
    """An executor with tiers beside it."""

    def __init__(self, executor: Executor, spec: TierSpec, clock: VirtualClock) -> None:
        self._executor = executor
        self._spec = spec
        self._clock = clock
        self.counts = MoveCounts()
        self.disk = None if spec.disk is None else VirtualDisk(spec.disk, spec.block_bytes)
        self._reading: dict[int, BlockMove] = {}  # from the disk, without a result
        self._filled: set[int] = set()  # slots of RAM that hold a block ...
        self._of_disk: set[int] = set()  # ... which was read, and has not been loaded since
        self._results: list[MoveResult] = []
        self._num_taken = 0  # results before those
        self._accounted_s = 0.0  # of the disk's time: hidden, or counted as exposed

    def submit(self, batch: ScheduledBatch) -> Done:
        start = self._clock.now
        self._account(is_step=False)  # since the last step
        del self._results[: batch.num_results_taken - self._num_taken]
        self._num_taken = batch.num_results_taken
        for move in batch.block_moves:
            self._do(move, batch)
        moving_s = self._clock.now - start
        output = StepOutput(())
        if batch.requests:
            output = self._executor.submit(batch).result()
            self._account(is_step=True)
        elif batch.awaits and self.disk is not None:
            before = self._clock.now
            self._clock.reach(self.disk.wait(batch.awaits, before, WAIT_S))
            self.counts.waited_s += self._clock.now - before
        self._collect()
        return Done(output._replace(moving_s=moving_s, moved=tuple(self._results)))

    def pass_steps(self) -> tuple[MoveResult, ...]:
        """Steps without moves were computed up to now: what they would have told of the disk."""
        self._account(is_step=True)
        self._collect()
        return tuple(self._results)

    def _account(self, *, is_step: bool) -> None:
        """For the disk's time up to now."""
        if self.disk is None:
            return
        self.disk.run(self._clock.now)
        busy_s = self.disk.busy_s(self._clock.now)
        if not is_step:
            self.counts.exposed_s += busy_s - self._accounted_s
        self._accounted_s = busy_s

    def _do(self, move: BlockMove, batch: ScheduledBatch) -> None:
        match move.source, move.target:
            case "arena", "ram":
                self._fill(move.target_blocks)
                self._report(move, self._copy(move))
            case "ram", "arena":
                self._count_loaded(move, batch)
                self._report(move, self._copy(move))
            case "disk", "ram":
                assert self.disk is not None, "there is no disk"
                self._fill(move.target_blocks)
                self._reading[move.move_id] = move
                self.disk.add(move, self._clock.now)
            case _, "disk":
                self._write(move)
            case _:
                raise AssertionError(f"nobody drops here: {move.source} to {move.target}")

    def _write(self, move: BlockMove) -> None:
        assert self.disk is not None, "there is no disk"
        self.disk.run(self._clock.now)
        if not self.disk.has_room_for(len(move.keys)):
            self.counts.num_refused += len(move.keys)
            self._results.append(MoveResult(move.move_id, 0, error=BEHIND))
            return
        self._copy(move)
        self.disk.add(move, self._clock.now)

    def _copy(self, move: BlockMove) -> float:
        """Inside the step. Seconds."""
        seconds = len(move.keys) * self._spec.block_bytes / self._spec.copy_bytes_per_s
        self._clock.advance(seconds)
        self.counts.copy_s += seconds
        return seconds

    def _report(self, move: BlockMove, seconds: float) -> None:
        self._results.append(MoveResult(move.move_id, len(move.keys), seconds))

    def _collect(self) -> None:
        """What the disk has done by now."""
        if self.disk is None:
            return
        self.disk.run(self._clock.now)
        for result in self.disk.take_results():
            self._results.append(result)
            if (move := self._reading.pop(result.move_id, None)) is not None:
                self._of_disk.update(move.target_blocks[: result.num_done])
                self._filled.difference_update(move.target_blocks[result.num_done :])

    def _fill(self, slots: tuple[int, ...]) -> None:
        self.counts.num_dropped += len(self._filled.intersection(slots))
        self._filled.update(slots)
        self._of_disk.difference_update(slots)

    def _count_loaded(self, move: BlockMove, batch: ScheduledBatch) -> None:
        """A block that came from the disk for a request counts as the disk's; the next time that it
        is loaded, it is RAM that had it."""
        own = {
            block
            for item in batch.requests
            if not item.epoch and item.source is None
            for block in item.block_table
        }
        counts = self.counts
        for slot, block in zip(move.source_blocks, move.target_blocks, strict=True):
            is_hit = block in own
            if slot in self._of_disk:
                self._of_disk.remove(slot)
                counts.num_from_disk += 1
                counts.num_disk_hits += is_hit
            else:
                counts.num_from_ram += 1
                counts.num_ram_hits += is_hit
