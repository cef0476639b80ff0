"""What users want of the cache: to know what is there, to keep it, for how long, and to drop it.

A pin is meant for hashes, not for blocks: what of it is there is kept, and what is computed later
is kept from then on. Time is an argument. What is refused changes nothing. Bounds: pins.py.
"""

import heapq
from dataclasses import replace

from duetto.core.cache_control import (
    CachedText,
    CacheMessage,
    CacheReply,
    Drop,
    Dropped,
    Found,
    FoundRange,
    ListPins,
    LookUp,
    Pin,
    PinInfo,
    Pinned,
    PinNotFound,
    PinPage,
    Place,
    Unpin,
)
from duetto.core.config import SchedulerConfig
from duetto.scheduler.block_pool import PINNED, BlockHash, BlockPool
from duetto.scheduler.pins import Hold, Pins
from duetto.scheduler.tiers import Tiers


class Retention:
    """The only one that chooses the pool's levels and drops from it."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, tiers: Tiers) -> None:
        self._tiers = tiers
        self._block_size = config.block_size
        self._pool = pool
        self._pins = Pins(config)
        self._ends: list[tuple[float, int, Hold]] = []  # a heap; some ended or were renewed since

    def answer(self, message: CacheMessage, now: float) -> CacheReply:
        """Raises InvalidRequest, and has then changed nothing but what time changes."""
        self.expire(now)
        match message:
            case LookUp(text, segments):
                found = tuple([self._look_up(segment) for segment in segments])
                return replace(self._look_up(text), segments=found)
            case Pin():
                return self._pin(message, now)
            case Unpin(tenant, pin):
                return self._unpin(tenant, pin, now)
            case Drop(tenant, pin):
                return self._drop(tenant, pin)
            case ListPins():
                return self._page(message, now)

    def expire(self, now: float) -> None:
        """End the pins whose time is over: what nobody uses of them is evicted first."""
        while self._ends and self._ends[0][0] <= now:
            end, _, hold = heapq.heappop(self._ends)
            if hold.end == end and self._pins.is_live(hold):
                self._end(hold, is_over=True)

    def check(self) -> None:
        """Assert that the pool's levels are what the pins want."""
        self._pins.check()
        assert {h: self._pins.level(h) for h in self._pins.hashes} == self._pool._level_of
        timed = [hold for _, _, hold in self._ends if self._pins.is_live(hold)]
        for hold in self._pins.live:
            assert hold.end is None or hold in timed, "a pin will not end"
        assert len(self._ends) <= 2 * self._pins.num_live + 17, "ended pins pile up"

    # --- what is asked -----------------------------------------------------------------------

    def _look_up(self, text: CachedText) -> Found:
        size = self._block_size
        ranges: list[FoundRange] = []
        for index, block_hash in enumerate(text.hashes):
            tier = self._where(block_hash)
            if tier is None:
                break
            level = self._pool.level(block_hash)
            priority = None if tier != "memory" or level == PINNED else level
            start, end = index * size, text.num_tokens_in(index + 1, size)
            if ranges and (ranges[-1].tier, ranges[-1].priority) == (tier, priority):
                start = ranges.pop().start
            ranges.append(FoundRange(start, end, priority, tier))
        num_blocks = len(self._pool.find(text.hashes))
        num_reached = num_blocks + self._tiers.num_reachable(text.hashes[num_blocks:])
        num_cached, num_there = (
            self._num_reusable(text, count) for count in (num_blocks, num_reached)
        )
        return Found(text.num_tokens, num_cached, num_there - num_cached, tuple(ranges))

    def _where(self, block_hash: BlockHash) -> Place | None:
        if self._pool.find((block_hash,)):
            return "memory"
        return self._tiers.where(block_hash)

    def _num_reusable(self, text: CachedText, num_blocks: int) -> int:
        """Tokens that need not be computed where so many blocks are there."""
        num_tokens = text.num_tokens_in(num_blocks, self._block_size)
        if text.is_segment:
            return num_tokens
        # The last token of a prompt is always computed.
        return min(num_tokens, (text.num_tokens - 1) // self._block_size * self._block_size)

    def _pin(self, message: Pin, now: float) -> Pinned:
        message.check()
        tenant, text = message.tenant, message.text
        hold = self._pins.find(tenant, text)
        if hold is None:
            self._pins.check_room(tenant, text)
            hold = Hold(tenant, text, now)
            self._pins.begin(hold)
        hold.priority = message.priority
        hold.end = None if message.ttl_s is None else now + message.ttl_s
        if hold.end is not None:
            heapq.heappush(self._ends, (hold.end, hold.serial, hold))
            self._sweep()
        self._set_levels(hold)
        return self._told(hold, now)

    def _unpin(self, tenant: bytes, pin: int | CachedText, now: float) -> Pinned:
        hold = self._pins.find(tenant, pin)
        if hold is None:
            raise PinNotFound
        self._end(hold)
        return self._told(hold, now)

    def _drop(self, tenant: bytes, pin: int | CachedText) -> Dropped:
        hold = self._pins.find(tenant, pin)
        if isinstance(pin, CachedText):
            hashes = pin.hashes
        elif hold is None:
            raise PinNotFound
        else:
            hashes = hold.text.hashes
        if hold is not None:
            self._end(hold)
        goes = [block_hash for block_hash in reversed(hashes) if not self._pins.is_held(block_hash)]
        are_owned = [self._pool.drop(block_hash) for block_hash in goes]
        in_tiers = self._tiers.forget(goes)
        for block_hash in in_tiers:
            self._pool.note_dropped(block_hash)
        return Dropped(
            num_dropped=len(goes) - are_owned.count(None),
            num_in_use=are_owned.count(True),
            num_in_tiers=len(in_tiers),
            num_kept=len(self._pool.find(hashes)),
            has_ended_pin=hold is not None,
            counts=self._pool.counts,
        )

    def _page(self, message: ListPins, now: float) -> PinPage:
        later = [h for h in self._pins.of_tenant(message.tenant) if h.number > message.after]
        page = later[: message.limit]
        told = [self._info(hold, now) for hold in page]
        return PinPage(told, len(later) > len(page), self._pins.usage(message.tenant))

    # --- pins --------------------------------------------------------------------------------

    def _end(self, hold: Hold, *, is_over: bool = False) -> None:
        self._pins.end(hold)
        self._set_levels(hold, is_over=is_over)

    def _set_levels(self, hold: Hold, *, is_over: bool = False) -> None:
        """The last block first, so that a prefix outlives its own tail."""
        for block_hash in reversed(hold.text.hashes):
            self._pool.set_level(block_hash, self._pins.level(block_hash), is_over=is_over)

    def _sweep(self) -> None:
        """Forget the ends of pins that were renewed or ended; a live one has one entry."""
        if len(self._ends) > 2 * self._pins.num_live + 16:
            live = {id(h): (end, n, h) for end, n, h in self._ends if self._is_end_of(end, h)}
            self._ends = list(live.values())
            heapq.heapify(self._ends)

    def _is_end_of(self, end: float, hold: Hold) -> bool:
        return hold.end == end and self._pins.is_live(hold)

    def _told(self, hold: Hold, now: float) -> Pinned:
        return Pinned(self._info(hold, now), self._pins.usage(hold.tenant), self._pool.counts)

    def _info(self, hold: Hold, now: float) -> PinInfo:
        text, size = hold.text, self._block_size
        return PinInfo(
            number=hold.number,
            num_tokens=text.num_tokens_in(len(text.hashes), size),
            num_blocks=len(text.hashes),
            num_cached=text.num_tokens_in(len(self._pool.find(text.hashes)), size),
            is_segment=text.is_segment,
            priority=hold.priority,
            ttl_left_s=None if hold.end is None else hold.end - now,
            age_s=now - hold.start,
        )
