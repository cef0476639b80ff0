"""A world in which users pin, rank, drop and look up KV while requests run, and its slow twin.

`PinBook` is the twin: pins as a plain list, every question answered by going through all of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from fakes import generate_alone, make_request
from scheduler.reuse_world import TEXTS, World, any_choice, config, reusing
from shadow import shadow_kvs

from duetto.core.cache_control import (
    DEFAULT_PRIORITY,
    CachedText,
    Drop,
    Dropped,
    Found,
    ListPins,
    LookUp,
    Pin,
    Pinned,
    PinNotFound,
    PinPage,
    PinQuotaExceeded,
    Unpin,
)
from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.engine.engine import Engine
from duetto.scheduler.reuse import text_hashes
from duetto.scheduler.scheduler import Scheduler

MakeScheduler = Callable[..., Scheduler]
PINNED = 101
WHO = [(b"", b""), (b"x", b"x"), (b"y", b"")]  # tenants and their salts; two of them share one


def text_of(
    token_ids: Sequence[int],
    config: SchedulerConfig,
    salt: bytes = b"",
    *,
    is_segment: bool = False,
) -> CachedText:
    num_full = len(token_ids) // config.block_size * config.block_size
    kept = tuple(token_ids if is_segment else token_ids[:num_full])
    hashes = tuple(text_hashes(kept, config, salt))
    return CachedText(len(token_ids), hashes, is_segment)


@dataclass
class Noted:
    tenant: bytes
    text: CachedText
    number: int
    priority: int | None
    end: float | None


class PinBook:
    """What pins should be there."""

    def __init__(self, config: SchedulerConfig) -> None:
        longest = config.num_blocks_for(config.context_length - 1)
        self.most = min(config.num_blocks // 2, config.num_blocks - longest)
        self.quota = min(config.num_blocks // 4, self.most)
        self.pins: list[Noted] = []

    def expire(self, now: float) -> None:
        self.pins = [pin for pin in self.pins if pin.end is None or pin.end > now]

    def of(self, tenant: bytes, text: CachedText) -> Noted | None:
        its = [p for p in self.pins if p.tenant == tenant and p.text.hashes == text.hashes]
        assert len(its) <= 1
        return its[0] if its else None

    def level(self, block_hash: bytes) -> int | None:
        levels = [
            PINNED if pin.priority is None else pin.priority
            for pin in self.pins
            if block_hash in pin.text.hashes
        ]
        return max(levels, default=None)

    def kept(self, tenant: bytes | None) -> set[bytes]:
        """Hashes that pins of a tenant hold; None: of all."""
        return {h for p in self.pins if tenant in (None, p.tenant) for h in p.text.hashes}

    def may_pin(self, tenant: bytes, text: CachedText) -> bool:
        own, every = self.kept(tenant) | {*text.hashes}, self.kept(None) | {*text.hashes}
        return len(own) <= self.quota and len(every) <= self.most


class PinWorld(World):
    """Every message is answered as the book says; what is pinned stays where it is."""

    def __init__(
        self, config: SchedulerConfig, depth: int = 0, make_scheduler: MakeScheduler = Scheduler
    ) -> None:
        super().__init__(config, depth, make_scheduler)
        self.config = config
        self.now = 0.0
        self.engine = Engine(self.scheduler, self.executor, clock=lambda: self.now, depth=depth)
        self.book = PinBook(config)
        self.there: dict[bytes, int] = {}  # pinned and found at the last look: hash -> block
        self.num_refused = self._num_quota = 0

    def step(self) -> None:
        super().step()
        self.book.expire(self.now)  # a step begins with it
        self.check()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    # --- messages ----------------------------------------------------------------------------

    def pin(
        self,
        tenant: bytes,
        text: CachedText,
        ttl_s: float | None = None,
        priority: int | None = None,
    ) -> Pinned | None:
        self.book.expire(self.now)
        message = Pin(tenant, text, ttl_s, priority)
        noted = self.book.of(tenant, text)
        if not text.hashes or (noted is None and not self.book.may_pin(tenant, text)):
            self.num_refused += 1
            self.refused(message, PinQuotaExceeded if text.hashes else InvalidRequest)
            return None
        reply: Pinned = self.engine.control(message)  # type: ignore[assignment]
        end = None if ttl_s is None else self.now + ttl_s
        if noted is None:
            self.book.pins.append(Noted(tenant, text, reply.pin.number, priority, end))
        else:
            assert noted.number == reply.pin.number
            noted.priority, noted.end = priority, end
        assert reply.usage == (len(self.book.kept(tenant)), self.book.quota)
        assert reply.pin.num_blocks == len(text.hashes)
        self.check()
        return reply

    def unpin(self, tenant: bytes, pin: int | CachedText) -> None:
        self.book.expire(self.now)
        noted = self.sought(tenant, pin)
        if noted is None:
            self.refused(Unpin(tenant, pin), PinNotFound)
            return
        self.engine.control(Unpin(tenant, pin))
        self.book.pins.remove(noted)
        self.check()

    def drop(self, tenant: bytes, pin: int | CachedText) -> Dropped | None:
        self.book.expire(self.now)
        noted, pool = self.sought(tenant, pin), self.scheduler.pool
        if noted is None and not isinstance(pin, CachedText):
            self.refused(Drop(tenant, pin), PinNotFound)
            return None
        text = pin if isinstance(pin, CachedText) else noted.text  # type: ignore[union-attr]
        if noted is not None:
            self.book.pins.remove(noted)
        goes = {h for h in text.hashes if h in pool._block_of and self.book.level(h) is None}
        owned = {h for h in goes if pool._ref_counts[pool._block_of[h]]}
        before = pool.counts
        reply: Dropped = self.engine.control(Drop(tenant, pin))  # type: ignore[assignment]
        assert (reply.num_dropped, reply.num_in_use) == (len(goes), len(owned))
        assert reply.has_ended_pin == (noted is not None)
        assert not goes & pool._block_of.keys(), "what was dropped is found"
        assert pool.counts.dropped - before.dropped == len(goes)
        self.check()
        return reply

    def look_up(self, text: CachedText, token_ids: Sequence[int]) -> Found:
        """What is there is what was computed for these tokens; and looking changes nothing."""
        self.book.expire(self.now)
        self.engine.control(ListPins(b""))  # what time alone changes
        before = self.state()
        found: Found = self.engine.control(LookUp(text))  # type: ignore[assignment]
        assert self.state() == before, "a look-up changes something"
        pool, size = self.scheduler.pool, self.config.block_size
        kvs, end = shadow_kvs(token_ids), 0
        for first in range(len(text.hashes)):
            block = pool._block_of.get(text.hashes[first])
            if block is None:
                break
            start, end = first * size, min((first + 1) * size, len(token_ids))
            assert self.executor.read_block(block)[: end - start] == kvs[start:end]
        bounds = [0, *[one.end for one in found.ranges]]
        assert bounds[:-1] == [one.start for one in found.ranges] and bounds[-1] == end
        for one in found.ranges:
            for block_hash in text.hashes[one.start // size : -(-one.end // size)]:
                level = self.book.level(block_hash)
                level = DEFAULT_PRIORITY if level is None else level
                assert one.priority == (None if level == PINNED else level)
        most = end if text.is_segment else (len(token_ids) - 1) // size * size
        assert found.num_cached == min(end, most)
        return found

    def list_pins(self, tenant: bytes, limit: int = 2) -> None:
        self.book.expire(self.now)
        told, after, has_more = [], 0, True
        while has_more:
            page: PinPage = self.engine.control(ListPins(tenant, after, limit))  # type: ignore[assignment]
            assert len(page.pins) <= limit
            told += page.pins
            assert len(told) <= len(self.book.pins), "a page comes again"
            has_more, after = page.has_more, page.pins[-1].number if page.pins else 0
            assert page.usage == (len(self.book.kept(tenant)), self.book.quota)
        own = [p for p in self.book.pins if p.tenant == tenant]
        assert [p.number for p in told] == [p.number for p in own]
        for one, noted in zip(told, own, strict=True):
            assert one.priority == noted.priority
            assert one.ttl_left_s == (None if noted.end is None else noted.end - self.now)

    def refused(self, message: Any, error: type[InvalidRequest]) -> None:
        self.engine.control(ListPins(b""))
        before = self.state()
        with pytest.raises(error):
            self.engine.control(message)
        assert self.state() == before, "a refusal changes something"

    def sought(self, tenant: bytes, pin: int | CachedText) -> Noted | None:
        if isinstance(pin, CachedText):
            return self.book.of(tenant, pin)
        return next((p for p in self.book.pins if (p.tenant, p.number) == (tenant, pin)), None)

    # --- what must hold ----------------------------------------------------------------------

    def state(self) -> list[object]:
        pool, pins = self.scheduler.pool, self.scheduler.retention._pins
        state: list[object] = [list(pool._free), list(pool._kept), pool._ref_counts[:]]
        state += [dict(pool._block_of), dict(pool._level_of), pool.counts, list(pool._evicted)]
        return [*state, [(h.tenant, h.number, h.priority, h.end) for h in pins.live]]

    def check(self) -> None:
        self.scheduler.check()
        pool = self.scheduler.pool
        wanted = {h: self.book.level(h) for h in self.book.kept(None)}
        assert pool._level_of == wanted, "levels are not what pins want"
        pinned = {h for h, level in wanted.items() if level == PINNED}
        lost = {h for h, block in self.there.items() if pool._block_of.get(h) != block} & pinned
        num_gone = pool.counts.quota - self._num_quota  # that gave way since the last look
        assert len(lost) <= num_gone, "a pinned block was evicted"
        self.there = {h: pool._block_of[h] for h in pinned if h in pool._block_of}
        self._num_quota = pool.counts.quota

    def forget_all(self) -> None:
        self.scheduler.pool.forget_all()
        self.there = {}
        self.check()


def pin_swarm(seed: int, depth: int, make_scheduler: MakeScheduler = Scheduler) -> PinWorld:
    """Requests and messages at random, in a pool too small for them."""
    random = Random(seed)
    block_size = random.choice((1, 3, 4, 8))
    world = PinWorld(
        config(
            num_blocks=random.choice((80, 100, 130)) // block_size,
            block_size=block_size,
            max_model_len=64,
            max_num_batched_tokens=random.choice((3, 7, 16, 200)),
            max_num_seqs=random.choice((1, 2, 4)),
        ),
        depth,
        make_scheduler,
    )
    requests = [_random_request(random, f"r{number}", world.config) for number in range(24)]
    world.seen = requests
    waiting = [*requests]
    while world.engine.has_work or waiting:
        if waiting and random.random() < 0.4:
            world.add(waiting.pop())
        if random.random() < 0.5:
            _random_message(random, world, requests)
        if world.engine.has_work:
            world.step()
        world.pass_time(random.choice((0.0, 0.0, 1.0)))
        if random.random() < 0.02:
            world.forget_all()
    for request in requests:
        assert world.tokens[request.request_id] == generate_alone(request)
    for pin in [*world.book.pins]:
        world.unpin(pin.tenant, pin.text)
    assert world.scheduler.pool.num_free == world.config.num_blocks, "leaked blocks"
    return world


def _random_request(random: Random, name: str, config: SchedulerConfig) -> Request:
    while True:
        tenant, salt = random.choice(WHO)
        request = reusing(
            name,
            random.sample(TEXTS, k=random.randrange(5)),
            before=tuple(random.choices((1, 2), k=random.randrange(3))),
            max_tokens=random.randrange(1, 20),
            seed=random.randrange(3),
            cache_salt=salt,
            **any_choice(random),
        )
        if random.random() < 0.5:
            request = make_request(
                name, request.prompt_token_ids, request.max_tokens, cache_salt=salt, tenant=tenant
            )
        try:
            config.check_fits(request)
        except InvalidRequest:  # another one
            continue
        return request


def _random_message(random: Random, world: PinWorld, requests: list[Request]) -> None:
    tenant, salt = random.choice(WHO)
    is_segment = random.random() < 0.3
    tokens = random.choice(TEXTS) if is_segment else tuple(random.choice(requests).token_ids)
    tokens = tokens[: random.choice((9, 18, 64))]
    text = text_of(tokens, world.config, salt, is_segment=is_segment)
    pin: int | CachedText = text
    if world.book.pins and random.random() < 0.5:
        pin = random.choice((random.randrange(9), random.choice(world.book.pins).number))
    match random.choice(("pin", "pin", "pin", "unpin", "drop", "look_up", "list")):
        case "pin":
            ttl_s = random.choice((None, 1.0, 3.0, 9.0))
            world.pin(tenant, text, ttl_s, random.choice((None, None, 0, 20, 35, 80)))
        case "unpin":
            world.unpin(tenant, pin)
        case "drop":
            world.drop(tenant, pin)
        case "look_up":
            world.look_up(text, tokens)
        case "list":
            world.list_pins(tenant)
