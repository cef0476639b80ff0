"""A world with tiers: requests that reuse prefixes and texts, an arena that is too small for them,
RAM and a disk that are too small too, a disk that fails, and users who drop texts and look them up.
The moves are done by the true Mover; the KV is the shadow executor's, so a block that comes back as
another changes an answer."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
from fakes import ShadowExecutor, generate_alone, make_request
from scheduler.pin_world import text_of
from scheduler.reuse_world import TEXTS, config, reusing
from shadow import shadow_kvs

from duetto.core.batch import BlockMove, MoveResult, ScheduledBatch
from duetto.core.cache_control import CachedText, Drop, Dropped, Found, LookUp
from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.executor import Done
from duetto.core.request import Request
from duetto.core.shape import StepTime
from duetto.engine.engine import Engine
from duetto.runner.tiers.mover import Mover, TierRoom
from duetto.scheduler.block_pool import next_hash, root_hash
from duetto.scheduler.reuse import text_hashes
from duetto.scheduler.scheduler import Scheduler
from duetto.scheduler.tiers import Tiers, TierSizes

MakeScheduler = Callable[..., Scheduler]
INT = np.dtype(np.int64)


class FakeDisk:
    """Blocks by their keys, `num_blocks` at most. What is under way is done when somebody waits,
    or sooner or later; some of it fails."""

    def __init__(self, num_blocks: int, random: Random, failing: float = 0.0) -> None:
        self.blocks: OrderedDict[bytes, bytes] = OrderedDict()
        self.written_by: dict[bytes, int] = {}  # the last move of this start, by key
        self._num_blocks, self._random, self.failing = num_blocks, random, failing
        self._jobs: list[tuple[BlockMove, Any]] = []
        self._results: list[MoveResult] = []
        self.is_behind = False

    def has_room_for(self, num_bytes: int) -> bool:
        return not self.is_behind and num_bytes > 0

    def write(self, move: BlockMove, blocks: Any) -> None:
        self._jobs.append((move, blocks))

    def read(self, move: BlockMove, rows: Any) -> None:
        self._jobs.append((move, rows))

    def forget(self, move: BlockMove) -> None:
        self._jobs.append((move, ()))

    def take_results(self) -> list[MoveResult]:
        for _ in range(self._random.randrange(3)):
            self._do_one()
        results, self._results = self._results, []
        return results

    def wait(self, move_ids: Sequence[int], timeout_s: float) -> None:
        assert timeout_s < 1
        while {move.move_id for move, _ in self._jobs}.intersection(move_ids):
            self._do_one()

    def do_all(self) -> None:
        while self._jobs:
            self._do_one()

    def _do_one(self) -> None:
        if not self._jobs:
            return
        move, data = self._jobs.pop(0)
        dropped: list[bytes] = []
        num_done = len(move.keys)
        if move.target == "nowhere":
            dropped += [key for key in move.keys if self.blocks.pop(key, None) is not None]
        elif self._random.random() < self.failing:
            num_done = self._random.randrange(num_done) if move.source == "disk" else 0
        for key, row in zip(move.keys[:num_done], data, strict=False):
            if move.target == "disk":
                self.blocks[key] = row.tobytes()
                self.written_by[key] = move.move_id
            elif key in self.blocks:
                row[:] = np.frombuffer(self.blocks[key], np.uint8)
            else:
                num_done = move.keys.index(key)
                break
        while len(self.blocks) > self._num_blocks:
            dropped.append(self.blocks.popitem(last=False)[0])
        error = None if num_done == len(move.keys) else "planted"
        self._results.append(MoveResult(move.move_id, num_done, 0.0, error, tuple(dropped)))


class TieredExecutor(ShadowExecutor):
    """A shadow executor whose blocks come and go."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_slots: int,
        disk: FakeDisk | None,
        make_mover: Callable[..., Mover] = Mover,
    ) -> None:
        super().__init__(config.num_blocks, config.block_size)
        self.disk = disk
        room = TierRoom(num_slots, 2 * config.block_size * INT.itemsize, disk)  # type: ignore[arg-type]
        self.mover = make_mover(self, None, room)  # it is the backend too
        self.fails_before_moving = False

    def export_blocks(
        self, _kv: None, blocks: Sequence[int], out: Any, num_tokens: Sequence[int] = ()
    ) -> None:
        size = self._block_size
        counts = num_tokens or [size] * len(blocks)
        for row, block, count in zip(out, blocks, counts, strict=True):
            tokens = self._tokens[block * size : block * size + count]
            parts = self.read_block(block)[:count], [0] * (size - count)
            row[:] = np.array([*parts[0], *parts[1], *tokens, *parts[1]], INT).view(np.uint8)

    def import_blocks(self, _kv: None, blocks: Sequence[int], data: Any) -> None:
        size = self._block_size
        for row, block in zip(data, blocks, strict=True):
            stored, slots = row.view(INT).tolist(), slice(block * size, (block + 1) * size)
            self._slots[slots], self._tokens[slots] = stored[:size], stored[size:]

    def submit(self, batch: ScheduledBatch) -> Any:
        if self.fails_before_moving:
            self.fails_before_moving, self.is_tainted = False, True
            raise RuntimeError("planted failure before the moves")
        self.mover.move(batch)
        pending = super().submit(batch)
        if not isinstance(pending, Done):
            return pending
        return Done(pending.output._replace(moved=self.mover.results(batch.awaits)))


class TierWorld:
    """An engine that is checked after every step."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_slots: int = 16,
        disk: FakeDisk | None = None,
        *,
        depth: int = 0,
        make_scheduler: MakeScheduler = Scheduler,
        make_tiers: Callable[..., Tiers] = Tiers,
        make_mover: Callable[..., Mover] = Mover,
        step_time: StepTime | None = None,
    ) -> None:
        keys = [*disk.blocks] if disk is not None else []
        if disk is not None:
            disk.written_by.clear()
        sizes = TierSizes(num_slots, disk is not None)
        self.tiers = make_tiers(sizes, config.block_size, keys, step_time)
        self.scheduler = make_scheduler(config, tiers=self.tiers)
        self.executor = TieredExecutor(config, num_slots, disk, make_mover)
        self.disk = disk
        self.now = 0.0
        self.engine = Engine(self.scheduler, self.executor, clock=lambda: self.now, depth=depth)
        self.tokens: dict[str, list[int]] = {}
        self.known: dict[bytes, list[int]] = {}  # what each key stands for
        self.dropped: set[bytes] = set()  # and not published since
        self.dropped_before: dict[bytes, int] = {}  # which move, when last
        note_published = self.tiers.note_published

        def noted(keys: Sequence[bytes], *rest: Any) -> None:
            self.dropped.difference_update(keys)
            note_published(keys, *rest)

        self.tiers.note_published = noted  # type: ignore[method-assign]

    def add(self, request: Request) -> None:
        self.tokens[request.request_id] = []
        self._learn(request)
        self.engine.add(request)

    def step(self) -> None:
        for update in self.engine.step().updates:
            assert update.error is None, update.error
            self.tokens[update.request_id] += [token.token_id for token in update.tokens]
        assert self.executor.complaint is None, self.executor.complaint
        self.scheduler.check()
        self.check_found()

    def run(self, *requests: Request) -> int:
        """Returns how many tokens were computed."""
        before = self.executor.num_tokens_run
        for request in requests:
            self.add(request)
        for _ in range(300):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "it does not come to an end"
        for request in requests:
            assert self.tokens[request.request_id] == generate_alone(request)
        return self.executor.num_tokens_run - before

    def drop(self, text: CachedText) -> Dropped:
        """Of the tenant without a name; nobody pins here."""
        there = {*text.hashes} & {*self.tiers._ram._slot_of, *self.tiers._on_disk}
        reply = self.engine.control(Drop(b"", text))
        assert isinstance(reply, Dropped)
        assert reply.num_in_tiers == len(there)
        self.dropped.update(text.hashes)
        self.dropped_before |= dict.fromkeys(text.hashes, self.tiers._next_id)
        self.check_found()
        return reply

    def look_up(self, text: CachedText) -> Found:
        """What is told is what going through all tiers finds, block by block; nothing changes."""
        ram, pool, size = self.tiers._ram, self.scheduler.pool, self.scheduler.config.block_size
        before = self._state()
        found = self.engine.control(LookUp(text))
        assert isinstance(found, Found)
        assert self._state() == before, "a look-up changes something"
        places: list[str] = []
        for key in text.hashes:
            tiers = {"memory": pool._block_of, "ram": ram._slot_of, "disk": self.tiers._on_disk}
            place = next((name for name, its in tiers.items() if key in its), None)
            if place is None:
                break
            places.append(place)
        told = [(p, one) for one in found.ranges for p in range(one.start, one.end)]
        assert [p for p, _ in told] == [*range(text.num_tokens_in(len(places), size))]
        for position, one in told:
            assert one.tier == places[position // size]
            assert one.priority == (35 if one.tier == "memory" else None) and not one.is_pinned
        num_cached = (*places, "end").index(next((p for p in places if p != "memory"), "end"))
        behind = text.hashes[num_cached:]
        lies_behind = [key in ram._slot_of or key in self.tiers._on_disk for key in behind]
        is_in_ram = [key in ram._slot_of for key in behind]
        num_loadable = (*lies_behind, False).index(False)
        num_loadable = min(num_loadable, max(ram.num_slots, (*is_in_ram, False).index(False)))
        limit = text.num_tokens if text.is_segment else (text.num_tokens - 1) // size * size
        cached = min(limit, text.num_tokens_in(num_cached, size))
        reached = min(limit, text.num_tokens_in(num_cached + num_loadable, size))
        assert (found.num_cached, found.num_loadable) == (cached, reached - cached)
        return found

    def _state(self) -> list[object]:
        pool, ram, tiers = self.scheduler.pool, self.tiers._ram, self.tiers
        state: list[object] = [list(pool._free), dict(pool._block_of), list(pool._evicted.items())]
        idle = {tenant: [*sizes] for tenant, sizes in ram._idle._sizes.items()}
        return [*state, idle, dict(ram._slot_of), set(tiers._on_disk), tiers._next_id]

    def keys_of(self, tokens: Sequence[int]) -> list[bytes]:
        """Of the full blocks of a text, without a salt."""
        config = self.scheduler.config
        return text_hashes(tuple(tokens), config, b"")[: len(tokens) // config.block_size]

    @property
    def found(self) -> set[bytes]:
        """Keys of what is found in the arena."""
        return {*self.scheduler.pool._hash_of.values()}

    def check_found(self) -> None:
        """What can be found under a key is what the key stands for, wherever it lies; and nothing
        is found that was dropped."""
        places = self.scheduler.pool._block_of, self.tiers._ram._slot_of, self.tiers._on_disk
        assert all(self.dropped.isdisjoint(place) for place in places), "dropped, and found"
        for block, key in self.scheduler.pool._hash_of.items():
            self._check_content(key, self.executor.read_block(block))
        for key, slot in self.tiers._ram._slot_of.items():
            self._check_content(key, self.executor.mover._ram[slot].view(INT).tolist())
        for key in self.disk.blocks if self.disk is not None else ():
            assert self.disk is not None
            self._check_content(key, np.frombuffer(self.disk.blocks[key], INT).tolist())

    def check_disk(self) -> None:
        """All is done: nothing is on the disk that was written before it was dropped."""
        if self.disk is None:
            return
        self.disk.do_all()
        for key in self.dropped_before.keys() & self.disk.blocks.keys():
            written_by = self.disk.written_by.get(key, -1)
            assert written_by >= self.dropped_before[key], "dropped, and on the disk"

    def _check_content(self, key: bytes, content: list[int]) -> None:
        known = self.known[key]
        assert content[: len(known)] == known, "found under a key is what it does not stand for"

    def _learn(self, request: Request) -> None:
        """What the keys stand for that a request may publish."""
        config, salt = self.scheduler.config, request.cache_salt
        size, parent = config.block_size, root_hash(config.cache_namespace, salt)
        tokens = [*request.prompt_token_ids, *generate_alone(request)][: request.num_exact_tokens]
        if not request.candidates:
            tokens = [*request.prompt_token_ids, *generate_alone(request)]
        kvs = shadow_kvs(tokens)
        for start in range(0, len(tokens) - size + 1, size):
            parent = next_hash(parent, tokens[start : start + size])
            self.known[parent] = kvs[start : start + size]
        for start, end in request.reuse.segments if request.reuse is not None else ():
            text = request.prompt_token_ids[start:end]
            kvs = shadow_kvs(text)
            for index, key in enumerate(text_hashes(text, config, salt)):
                self.known[key] = kvs[index * size : (index + 1) * size]


def random_request(name: str, random: Random) -> Request:
    ratio = random.choice((None, None, 0.3))
    return reusing(
        name,
        random.choices(TEXTS, k=random.randrange(4)),
        before=tuple(random.choices(range(1, 4), k=random.choice((0, 2, 9)))),
        num_first=random.choice((0, 0, 2)) if ratio is None else 0,
        ratio=ratio,
        num_rounds=random.choice((0, 1, 2)) if ratio is not None else 0,
        max_tokens=random.randrange(1, 30),
        seed=random.randrange(5),
        tenant=random.choice((b"", b"a", b"b")),
    )


def swarm(seed: int, depth: int = 0, **makers: Any) -> list[TierWorld]:
    """Requests come at random; everything is too small, and the disk fails now and then. Then the
    same ones come to another process with the same disk."""
    random = Random(seed)
    block_size = random.choice((1, 3, 4, 8))
    disk = FakeDisk(random.choice((3, 40, 200)), random, random.choice((0.0, 0.2)))
    sizes = config(
        num_blocks=random.choice((90, 130)) // block_size,
        block_size=block_size,
        max_num_batched_tokens=random.choice((3, 7, 16, 200)),
        max_num_seqs=random.choice((2, 4, 6)),
    )
    options = {"num_slots": random.choice((4, 16, 40)), "depth": depth, **makers}
    options["disk"] = disk if random.random() < 0.8 else None
    options["step_time"] = random.choice((None, lambda _: random.choice((0.0, 9.0, 9.0))))
    worlds: list[TierWorld] = []
    for _ in range(2):
        worlds.append(TierWorld(sizes, **options))
        worlds[-1].known |= worlds[0].known
        _live_in(worlds[-1], random_requests(Random(seed), sizes), random)
        disk.do_all()
        disk.take_results()
    return worlds


def random_requests(random: Random, sizes: SchedulerConfig) -> list[Request]:
    requests: list[Request] = []
    while len(requests) < 16:
        request = random_request(f"r{len(requests)}", random)
        with suppress(InvalidRequest):  # it cannot fit
            sizes.check_fits(request)
            requests.append(request)
            if random.random() < 0.4:  # the same prompt in full, which others may find
                requests.append(make_request(f"r{len(requests)}", request.prompt_token_ids, 5))
    return requests


def _live_in(world: TierWorld, requests: list[Request], random: Random) -> None:
    waiting = [*requests]
    for _ in range(3_000):
        if not (world.engine.has_work or waiting):
            break
        if waiting and random.random() < 0.3:
            world.add(waiting.pop())
        if world.engine.has_work:
            _disturb(world, random)
            _use(world, random, requests)
            world.step()
    assert not world.engine.has_work, "it does not come to an end"
    for request in requests:
        assert world.tokens[request.request_id] == generate_alone(request)
    world.check_disk()


def _use(world: TierWorld, random: Random, requests: list[Request]) -> None:
    """What users of the cache do."""
    draw = random.random()
    if draw > 0.12:
        return
    is_segment, request = random.random() < 0.4, random.choice(requests)
    tokens = random.choice(TEXTS) if is_segment else request.prompt_token_ids
    tokens = tokens[: random.choice((8, 16, 200))]
    salt = request.cache_salt
    text = text_of(tokens, world.scheduler.config, salt, is_segment=is_segment)
    if draw < 0.04:
        world.drop(text)
    else:
        world.look_up(text)


def _disturb(world: TierWorld, random: Random) -> None:
    world.now += random.random() / 4
    if random.random() < 0.01:
        world.scheduler.forget_cached()
    if random.random() < 0.05:
        world.tiers._ram.forget_all()
    if world.disk is not None:
        world.disk.is_behind = random.random() < 0.1
