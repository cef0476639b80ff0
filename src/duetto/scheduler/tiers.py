"""What becomes of KV that leaves the arena: which block is kept in RAM or on a disk, which comes
back, and when. Decides moves and believes reports; copies nothing and knows no file.

Nothing is findable in a tier before the move that brought it there has been reported, so whatever
goes wrong with a move is a miss. What is found is exact: it was published under its key.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple

from duetto.core.batch import BlockMove, MoveResult, MoveTarget, Tier
from duetto.core.request import Request
from duetto.core.reuse import Source
from duetto.core.shape import StepTime
from duetto.scheduler.block_pool import BlockHash
from duetto.scheduler.forgotten import Forgotten
from duetto.scheduler.ram_slots import RamSlots
from duetto.scheduler.tier_prices import TierPrices

MAX_RUN = 64  # blocks in a move, and so in a file
WAIT_S, WAIT_FACTOR = 2.0, 4.0  # a request waits so long, and so often what it should take


class TierSizes(NamedTuple):
    """What there is beside the arena."""

    num_ram_blocks: int = 0  # 0: no tiers
    has_disk: bool = False  # needs RAM, which it is loaded through


NO_TIERS = TierSizes()


@dataclass(slots=True)
class TierCounts:
    """Blocks, since the start."""

    num_kept: int = 0  # that left the arena, and came to RAM
    num_loaded: int = 0  # from RAM into the arena
    num_read: int = 0  # from the disk
    num_written: int = 0  # to the disk
    num_failed: int = 0  # of all moves
    num_declined: int = 0  # not read, as computing them was cheaper
    num_ram_declined: int = 0  # in RAM, and not loaded for the same reason


class _Run(NamedTuple):
    """Published blocks of the arena, which are to be written to the disk together."""

    keys: tuple[BlockHash, ...]
    blocks: tuple[int, ...]
    tenant: bytes

    def without(self, gone: Collection[BlockHash]) -> "_Run":
        left = [pair for pair in zip(self.keys, self.blocks, strict=True) if pair[0] not in gone]
        return _Run(tuple([k for k, _ in left]), tuple([b for _, b in left]), self.tenant)


class BlockLoad(NamedTuple):
    """Blocks that come from RAM for a request that is being admitted."""

    keys: Sequence[BlockHash]
    first: int  # of its blocks, or of its text's, the place of the first
    source: Source | None = None


class Tiers:
    """Between BlockPool, which tells what is published and evicted, and Admission, which asks."""

    def __init__(
        self,
        sizes: TierSizes,
        block_size: int,
        disk_keys: Iterable[BlockHash] = (),
        step_time: StepTime | None = None,
    ) -> None:
        """`disk_keys` are on the disk already; `step_time` says what computing would take."""
        assert sizes.num_ram_blocks or not sizes.has_disk, "a disk is loaded through RAM"
        self.is_on = sizes.num_ram_blocks > 0
        self._has_disk = sizes.has_disk
        self._block_size = block_size
        self.counts = TierCounts()
        self._prices = TierPrices(step_time)
        self._ram = RamSlots(sizes.num_ram_blocks)
        self._on_disk = set(disk_keys)
        self._writing: set[BlockHash] = set()
        self._tenant_of: dict[BlockHash, bytes] = {}  # of what is published in the arena
        self._num_tokens: dict[BlockHash, int] = {}  # of that, in blocks that are not full
        self._to_write: list[_Run] = []
        self._arriving: dict[BlockHash, float] = {}  # in RAM, and until when it is waited for
        self._held: dict[str, Sequence[BlockHash]] = {}  # in RAM, for requests that asked
        self._moves: list[BlockMove] = []  # of the step that is being planned
        self._open: dict[int, BlockMove] = {}  # not reported yet
        self._next_id = 0
        self._forgotten = Forgotten()
        self._now = 0.0  # when the step is planned
        self.num_taken = 0  # results of moves

    @property
    def has_pending(self) -> bool:
        """Whether something is to be moved although nothing is to be computed."""
        return bool(self._to_write or self._moves)

    # --- what the pool tells ---------------------------------------------------------------

    def note_published(
        self,
        keys: Sequence[BlockHash],
        blocks: Sequence[int],
        tenant: bytes,
        num_last: int | None = None,
    ) -> None:
        """These blocks of the arena are findable from now on. `num_last` tokens are in the last
        one, where it is not full."""
        if not self.is_on or not keys:
            return
        self._tenant_of.update(dict.fromkeys(keys, tenant))
        if num_last is not None:
            self._num_tokens[keys[-1]] = num_last
        if not self._has_disk:
            return
        new = [
            (key, block)
            for key, block in zip(keys, blocks, strict=True)
            if key not in self._on_disk and key not in self._writing
        ]
        for start in range(0, len(new), MAX_RUN):
            run = new[start : start + MAX_RUN]
            its_keys, its_blocks = zip(*run, strict=True)
            self._to_write.append(_Run(its_keys, its_blocks, tenant))
            self._writing.update(its_keys)

    def keep(self, key: BlockHash, block: int) -> None:
        """A published block is about to be taken by somebody else."""
        if not self.is_on:
            return
        tenant = self._tenant_of.pop(key, b"")
        num_tokens = self._num_tokens.pop(key, None)
        if key in self._ram:
            self._ram.touch(key)
            return
        if key in self._arriving or (slot := self._free_slot()) is None:
            return
        self._arriving[key] = self._now + WAIT_S
        short = () if num_tokens is None else (num_tokens,)
        self._move("arena", "ram", (key,), (block,), (slot,), tenant, short)

    def _free_slot(self) -> int | None:
        """Of what falls out, the disk gets a copy if it has none."""
        slot = self._ram.take()
        if slot is not None or (victim := self._ram.victim()) is None:
            return slot
        place = self._ram.slot(victim)
        tenant = self._ram.drop(victim)
        if self._has_disk and victim not in self._on_disk and victim not in self._writing:
            self._writing.add(victim)
            self._move("ram", "disk", (victim,), (place,), (), tenant)
        return self._ram.take()

    # --- what is asked -----------------------------------------------------------------------

    def where(self, key: BlockHash) -> Literal["ram", "disk"] | None:
        """The first tier behind the arena that has a block; None if none has. Changes nothing."""
        if key in self._ram:
            return "ram"
        return "disk" if key in self._on_disk else None

    def num_reachable(self, keys: Sequence[BlockHash]) -> int:
        """How many of the first of these blocks a request could load, at most. Changes nothing."""
        count = len([*takewhile(self.where, keys)])
        num_in_ram = len([*takewhile(self._ram.__contains__, keys)])
        return min(count, max(num_in_ram, self._ram.num_slots))

    def num_loadable(self, keys: Sequence[BlockHash], num_past: int, num_tokens: int) -> int:
        """How many of the first of these blocks, which follow `num_past` tokens that have KV, may
        come from RAM. A text's last block may be short: together they have at most `num_tokens`.
        """
        if not self.is_on:
            return 0
        count = len([*takewhile(self._ram.__contains__, keys)])
        saved = min(count * self._block_size, num_tokens)
        return count if count and self._prices.pays(count, 0, saved, num_past) else 0

    def note_computed(self, keys: Sequence[BlockHash]) -> None:
        """A request is admitted that computes these blocks."""
        self.counts.num_ram_declined += len([*takewhile(self._ram.__contains__, keys)])

    def is_on_its_way(self, keys: Sequence[BlockHash]) -> bool:
        """Whether one of the first of these blocks, all before it being there, will be soon."""
        if not self._arriving:
            return False
        first = next((key for key in keys if key not in self._ram), None)
        return first is not None and self._arriving.get(first, self._now) > self._now

    def send_for(
        self, request: Request, lacking: Iterable[tuple[Sequence[BlockHash], int]]
    ) -> bool:
        """Have what the disk has of a request's missing blocks brought to RAM, if that is cheaper
        than computing; once until it is admitted. `lacking`: chains of blocks, each after so many
        tokens that have KV. Whether something is under way."""
        if not self._has_disk or request.request_id in self._held:
            return False
        num_before = len(self._arriving)
        for keys, num_past in lacking:
            run = [*takewhile(self.where, keys)][: self._room_to_hold()]
            wanted = [key for key in run if key not in self._ram and key not in self._arriving]
            if not wanted:
                continue
            num_there = len(run) - len(wanted)
            if not self._prices.pays(num_there, len(wanted), len(run) * self._block_size, num_past):
                self.counts.num_declined += len(wanted)
                self._held.setdefault(request.request_id, ())  # it is not asked again
                continue
            self.hold(request, run)
            until = self._now + WAIT_S + WAIT_FACTOR * self._prices.load_s(num_there, len(wanted))
            for start in range(0, len(wanted), MAX_RUN):
                self._read(wanted[start : start + MAX_RUN], until, request.tenant)
        return len(self._arriving) > num_before

    def _room_to_hold(self) -> int:
        """Slots that one more request may hold: all while nobody holds any, else up to half."""
        num_held, num_slots = self._ram.num_held, self._ram.num_slots
        return max(0, num_slots // 2 - num_held) if num_held else num_slots

    def _read(self, keys: Sequence[BlockHash], until: float, tenant: bytes) -> None:
        slots: list[int] = []
        for _ in keys:
            if (slot := self._free_slot()) is None:
                break
            slots.append(slot)
        if not slots:
            return
        keys = tuple(keys[: len(slots)])
        self._arriving.update(dict.fromkeys(keys, until))
        self._move("disk", "ram", keys, (), tuple(slots), tenant)

    @contextmanager
    def keeping(self, keys: Sequence[BlockHash]) -> Iterator[None]:
        """None of these falls out of RAM within it."""
        self._ram.hold(keys)
        try:
            yield
        finally:
            self._ram.let_go(keys)

    def hold(self, request: Request, keys: Sequence[BlockHash]) -> None:
        """These do not fall out before the request is admitted or has ended."""
        if keys:
            self._ram.hold(keys)
            self._held[request.request_id] = (*self._held.get(request.request_id, ()), *keys)

    def load(self, keys: Sequence[BlockHash], blocks: Sequence[int], tenant: bytes) -> None:
        """Into blocks of the arena that the request has taken meanwhile."""
        if keys:
            slots = tuple([self._ram.slot(key) for key in keys])
            self._move("ram", "arena", tuple(keys), slots, tuple(blocks), tenant)

    def release(self, request_id: str) -> None:
        """What is held for a request, which is admitted or has ended, may fall out."""
        if self._held and (keys := self._held.pop(request_id, None)) is not None:
            self._ram.let_go(keys)

    # --- each step -------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """A step is about to be planned: what is to be written is read before it is overwritten."""
        self._now = now
        size = self._block_size
        for keys, blocks, tenant in self._to_write:
            is_short = any(key in self._num_tokens for key in keys)
            counts = [self._num_tokens.get(key, size) for key in keys] if is_short else ()
            self._move("arena", "disk", keys, blocks, (), tenant, tuple(counts))
        self._to_write = []

    def departing(self) -> tuple[BlockMove, ...]:
        """The moves of the step that has been planned."""
        moves, self._moves = self._moves, []
        return tuple(moves)

    def awaited(self) -> tuple[int, ...]:
        """Moves that bring something to RAM, and are not reported yet."""
        return tuple([move.move_id for move in self._open.values() if move.target == "ram"])

    def take(self, results: Iterable[MoveResult]) -> None:
        """What came of moves; what was taken already is passed over."""
        for result in results:
            move = self._open.pop(result.move_id, None)
            if move is None:
                continue
            self.num_taken += 1
            if move.source == "disk":  # what failed is not asked for again
                self._on_disk.difference_update(move.keys[result.num_done :][:1])
            self._prices.observe(move, result)
            self._take(move, result)
            self._on_disk.difference_update(result.dropped)
        self._forgotten.sweep(next(iter(self._open), self._next_id))

    def _take(self, move: BlockMove, result: MoveResult) -> None:
        done, counts = result.num_done, self.counts
        counts.num_failed += len(move.keys) - done
        if move.target == "disk":
            self._writing.difference_update(move.keys)
            self._on_disk.update([key for key in move.keys[:done] if self._is_wanted(key, move)])
            counts.num_written += done
        elif move.target == "nowhere":
            if not result.was_submitted:
                self._forget_on_disk(move.keys)
        elif move.target == "ram":
            for index, (key, slot) in enumerate(zip(move.keys, move.target_blocks, strict=True)):
                del self._arriving[key]
                if index < done and self._is_wanted(key, move):
                    self._ram.put(key, slot, move.tenant)
                else:
                    self._ram.give_back(slot)
            counts.num_read += done * (move.source == "disk")
            counts.num_kept += done * (move.source == "arena")
        else:
            counts.num_loaded += done

    def forget_all(self) -> None:
        """Nothing is findable, nor is what is on its way. Files stay, for another start."""
        self._ram.forget_all()
        self._on_disk.clear()
        self._writing.clear()
        self._tenant_of.clear()
        self._num_tokens.clear()
        self._to_write = []
        self._forgotten.add_all(self._next_id)

    def forget(self, keys: Sequence[BlockHash]) -> list[BlockHash]:
        """Dropped by their user: not findable in any tier, nor is what is on its way, and no file
        is to hold them. Returns those that were in RAM or on the disk."""
        if not self.is_on:
            return []
        there, gone = [key for key in keys if self.where(key)], frozenset(keys)
        for key in there:
            if key in self._ram:
                self._ram.drop(key)
        for key in keys:
            self._tenant_of.pop(key, None)
            self._num_tokens.pop(key, None)
        self._writing -= gone
        self._to_write = [left for run in self._to_write if (left := run.without(gone)).keys]
        if self._has_disk and keys:  # it may have what is not known of here
            self._forget_on_disk(tuple(keys))
        elif self._open:
            self._forgotten.add(keys, self._next_id)
        return there

    def _forget_on_disk(self, keys: tuple[BlockHash, ...]) -> None:
        self._on_disk.difference_update(keys)
        self._move("disk", "nowhere", keys, (), (), b"")
        self._forgotten.add(keys, self._next_id)

    def check(self) -> None:
        """Assert that no slot is lost, and that nothing is remembered for nobody."""
        on_their_way = [
            s for m in self._open.values() if m.target == "ram" for s in m.target_blocks
        ]
        self._ram.check(on_their_way)
        assert len(self._arriving) == len(on_their_way)
        assert self._num_tokens.keys() <= self._tenant_of.keys()
        assert self._open or not self._forgotten
        to_write = {key for run in self._to_write for key in run.keys}
        writing = {key for m in self._open.values() if m.target == "disk" for key in m.keys}
        assert self._writing <= to_write | writing, "it will never be written"

    def _is_wanted(self, key: BlockHash, move: BlockMove) -> bool:
        """It was not dropped after the move was planned."""
        return self._forgotten.is_wanted(key, move.move_id)

    def _move(
        self,
        source: Tier,
        target: MoveTarget,
        keys: tuple[BlockHash, ...],
        source_blocks: tuple[int, ...],
        target_blocks: tuple[int, ...],
        tenant: bytes,
        num_tokens: tuple[int, ...] = (),
    ) -> None:
        blocks = source_blocks, target_blocks
        move = BlockMove(self._next_id, source, target, keys, *blocks, tenant, num_tokens)
        self._next_id += 1
        self._moves.append(move)
        self._open[move.move_id] = move
