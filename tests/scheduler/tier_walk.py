"""A seeded random walk through tiers, pins, drops and failures together, as long as one likes.

Each episode is a small world: an arena, RAM and a disk that are all too small, and callers who pin,
rank, drop and look up, abort and are preempted while steps and moves fail. Every answer is the one
that a request gets alone; and at the end nothing is left over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from fakes import generate_alone
from scheduler.pin_world import text_of
from scheduler.tier_world import FakeDisk, TierWorld
from scheduler.walk import Habits, random_config, random_habits, random_request

from duetto.core.batch import ScheduledBatch
from duetto.core.cache_control import (
    CachedText,
    CacheMessage,
    CacheReply,
    Drop,
    Dropped,
    ListPins,
    LookUp,
    Pin,
    Unpin,
)
from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import FinishReason, Request, fan_out
from duetto.scheduler.block_pool import PINNED

STEPS_PER_EPISODE = 200
CHECK_EVERY, CHECK_FOUND_EVERY = 3, 16
WHO = (b"", b"x", b"y")
FAILURES = ("fails_before_moving", "fail_next", "fail_after_writing")
MESSAGES = ("pin", "pin", "rank", "unpin", "drop", "drop", "look_up", "look_up")
RULES = ("abort", "preempt", "forget", "forget_ram", "behind")


@dataclass(slots=True)
class Seen:
    """What a walk has come to; or it would show nothing."""

    num_steps: int = 0
    num_pins: int = 0
    num_refused: int = 0
    num_dropped: int = 0  # blocks in memory
    num_dropped_in_tiers: int = 0
    num_ended: int = 0
    num_failed: int = 0  # requests
    num_loaded: int = 0
    num_read: int = 0
    num_written: int = 0
    num_expired: int = 0  # blocks

    def __add__(self, other: "Seen") -> "Seen":
        names = self.__slots__
        return Seen(*[getattr(self, name) + getattr(other, name) for name in names])


class PinnedTierWorld(TierWorld):
    """Whose requests may fail, and whose texts may be pinned."""

    def __init__(self, config: SchedulerConfig, disk: FakeDisk | None, **options: Any) -> None:
        super().__init__(config, disk=disk, **options)
        self.seen = Seen()
        self.live: dict[str, Request] = {}
        self.pinned_at: dict[bytes, int] = {}  # found at the last look, and pinned: its block
        self.num_quota = 0

    def add(self, request: Request) -> None:
        try:
            super().add(request)
        except InvalidRequest:  # it can never fit
            return
        self.live[request.request_id] = request

    def step(self) -> None:
        self.seen.num_steps += 1
        for update in self.engine.step().updates:
            tokens = self.tokens[update.request_id]
            tokens += [token.token_id for token in update.tokens]
            if update.finish_reason is not None:
                self.end(update.request_id, update.finish_reason)
        assert self.executor.complaint is None, self.executor.complaint
        if not self.engine._in_flight:
            self.executor.is_tainted = False
        self.look_at_pins()

    def end(self, request_id: str, reason: FinishReason) -> None:
        expected = generate_alone(self.live.pop(request_id))
        tokens = self.tokens.pop(request_id)
        assert tokens == expected[: len(tokens)]
        is_whole = reason in (FinishReason.LENGTH, FinishReason.STOP)
        assert not is_whole or tokens == expected
        self.seen.num_ended += is_whole
        self.seen.num_failed += reason is FinishReason.ERROR

    def ask(self, message: CacheMessage) -> CacheReply | None:
        """None if it is refused, which changes nothing."""
        self.engine.control(ListPins(b""))  # what time alone changes
        self.look_at_pins()
        before = self._state()
        try:
            return self.engine.control(message)
        except InvalidRequest:
            assert self._state() == before, "a refusal changes something"
            self.seen.num_refused += 1
            return None
        finally:
            self.look_at_pins()

    def drop_of(self, tenant: bytes, pin: int | CachedText, texts: dict[int, CachedText]) -> None:
        reply = self.ask(Drop(tenant, pin))
        if reply is None:
            return
        assert isinstance(reply, Dropped)
        self.seen.num_dropped += reply.num_dropped
        self.seen.num_dropped_in_tiers += reply.num_in_tiers
        text = pin if isinstance(pin, CachedText) else texts[pin]
        gone = [h for h in text.hashes if not self.scheduler.retention._pins.is_held(h)]
        self.dropped.update(gone)
        self.dropped_before |= dict.fromkeys(gone, self.tiers._next_id)

    def check(self) -> None:
        """All counts agree, and all is within its bounds."""
        self.scheduler.check()
        pool, tiers = self.scheduler.pool, self.tiers
        assert tiers._tenant_of.keys() <= pool._block_of.keys(), "a block's owner leaks"
        assert len(tiers._ram._slot_of) <= tiers._ram.num_slots
        assert len(pool._evicted) <= pool.num_blocks
        assert tiers._held.keys() <= self.live.keys(), "slots are held for nobody"

    def look_at_pins(self) -> None:
        """What was pinned at the last look, and still is, has stayed."""
        pool = self.scheduler.pool
        pinned = {h for h, level in pool._level_of.items() if level == PINNED}
        lost = {h for h, b in self.pinned_at.items() if pool._block_of.get(h) != b} & pinned
        assert len(lost) <= pool.counts.quota - self.num_quota, "a pinned block was evicted"
        self.pinned_at = {h: b for h in pinned if (b := pool._block_of.get(h)) is not None}
        self.num_quota = pool.counts.quota

    def drain(self) -> None:
        """Everything comes to an end, and nothing is left over."""
        for _ in range(3_000):
            if not self.engine.has_work:
                break
            self.now += 0.5
            self.step()
        assert not self.engine.has_work and not self.live, "it does not come to an end"
        self.check()
        self.engine.control(ListPins(b""))  # ends those whose time is over
        for hold in self.scheduler.retention._pins.live:
            self.engine.control(Unpin(hold.tenant, hold.number))
        self.report_all()
        self.check()
        self.check_found()
        self.check_disk()
        tiers, pool = self.tiers, self.scheduler.pool
        assert pool.num_free == pool.num_blocks, "leaked blocks"
        left = tiers._open, tiers._arriving, tiers._writing, tiers._held, tiers._forgotten
        assert not any(map(len, left)), "something is remembered for ever"
        assert len(tiers._ram._free) + len(tiers._ram._slot_of) == tiers._ram.num_slots
        self.seen.num_loaded, self.seen.num_read = tiers.counts.num_loaded, tiers.counts.num_read
        self.seen.num_written = tiers.counts.num_written
        self.seen.num_expired = pool.counts.ttl

    def report_all(self) -> None:
        """Those whose step never came too, which a later one would tell of."""
        mover = self.executor.mover
        for _ in range(100):
            if not self.tiers._open:
                return
            while self.engine.has_work:
                self.step()
            if self.disk is not None:
                self.disk.do_all()
            mover.move(ScheduledBatch((), awaits=(self.tiers._next_id - 1,)))
            self.tiers.take(mover.results(()))
        raise AssertionError(f"moves without a result: {self.tiers._open}")


def tier_walk(seed: int, num_steps: int, **makers: Callable[..., Any]) -> Seen:
    """Walk at least `num_steps` steps. Raises if anything is ever wrong."""
    rng, seen = Random(seed), Seen()
    while seen.num_steps < num_steps:
        seen += _episode(rng, **makers)
    return seen


def _episode(rng: Random, **makers: Any) -> Seen:
    config, habits = random_config(rng), random_habits(rng)
    config = replace(config, enable_prefix_caching=True, target_itl_s=None)
    disk = FakeDisk(rng.choice((5, 20, 60)), rng, rng.choice((0.0, 0.0, 0.2)))
    world = PinnedTierWorld(
        config,
        disk if rng.random() < 0.8 else None,
        num_slots=rng.choice((4, 8, 16)),
        depth=0 if rng.random() < 0.5 else rng.randint(1, 2),
        step_time=rng.choice((None, lambda _: rng.choice((0.0, 9.0)))),
        **makers,
    )
    for number in range(STEPS_PER_EPISODE):
        if len(world.live) < habits.max_live and rng.random() < habits.add:
            for request in fan_out(random_request(rng, habits, f"r{number}")):
                request.arrival_time = request.timings.arrival_time = world.now
                request.timings.accounted_until = world.now
                world.add(request)
        if rng.random() < 0.4:
            _use(world, rng, habits)
        if rng.random() < habits.meddle:
            _meddle(world, rng)
        if rng.random() < habits.fault:
            setattr(world.executor, rng.choice(FAILURES), True)
        world.now += rng.choice((0.0, 0.25, 1.0))
        if world.engine.has_work:
            world.step()
        if number % CHECK_EVERY == 0:
            world.check()
        if number % CHECK_FOUND_EVERY == 0:
            world.check_found()
    world.drain()
    return world.seen


def _use(world: PinnedTierWorld, rng: Random, habits: Habits) -> None:
    """A message of somebody, about a prompt that lives, or a text."""
    live, tenant = [*world.live.values()], rng.choice(WHO)
    is_segment = bool(habits.texts) and rng.random() < 0.3
    if not live and not is_segment:
        return
    token_ids: Sequence[int]
    token_ids = rng.choice(habits.texts) if is_segment else rng.choice(live).token_ids
    salt, config = rng.choice(habits.salts), world.scheduler.config
    text = text_of(token_ids[: rng.choice((4, 8, 24))], config, salt, is_segment=is_segment)
    holds = [h for h in world.scheduler.retention._pins.live if h.tenant == tenant]
    by_number = {hold.number: hold.text for hold in holds}
    pin = rng.choice([*by_number]) if by_number and rng.random() < 0.5 else text
    match rng.choice(MESSAGES):
        case "pin" | "rank" as kind:
            priority = rng.choice((0, 20, 80)) if kind == "rank" else None
            made = world.ask(Pin(tenant, text, rng.choice((None, 1.0, 5.0)), priority))
            world.seen.num_pins += made is not None
        case "unpin":
            world.ask(Unpin(tenant, pin))
        case "drop":
            world.drop_of(tenant, pin, by_number)
        case "look_up":
            world.engine.control(ListPins(tenant))  # what time alone changes
            before = world._state()
            world.engine.control(LookUp(text))
            assert world._state() == before, "a look-up changes something"


def _meddle(world: PinnedTierWorld, rng: Random) -> None:
    request_id = rng.choice([*world.live, "unknown"])
    match rng.choice(RULES):
        case "abort":
            update = world.engine.abort(request_id)
            if update is not None and update.finish_reason is not None:
                world.end(request_id, update.finish_reason)
        case "preempt":
            request = world.scheduler.running.get(request_id)
            most = world.scheduler.config.max_preemptions
            if request is not None and request.timings.num_preemptions < most:
                world.scheduler._room.preempt(request)
        case "forget":
            world.scheduler.forget_cached()
            world.pinned_at = {}
        case "forget_ram":
            world.tiers._ram.forget_all()
        case "behind":
            if world.disk is not None:
                world.disk.is_behind = not world.disk.is_behind
