"""What may be asked of the KV cache beside requests, and what it answers. All of it is plain.

A text is meant by its chain of block hashes, which is made where the text became ids
(engine/intake.py): tenant and salt are in it, so nobody can mean another one's KV.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from duetto.core.errors import InvalidRequest

MIN_PRIORITY, DEFAULT_PRIORITY, MAX_PRIORITY = 0, 35, 100  # TensorRT-LLM's; the low go first
MAX_TTL_S = 366 * 86_400.0
MAX_PAGE = 100  # pins of one reply


class EvictionReason(enum.Enum):
    """Why the KV of a block can no longer be found."""

    ROOM = "room"  # its block was needed for a request
    TTL = "ttl"  # the same, and it went first as its time was over
    DROPPED = "dropped"  # its user said so, or the whole cache was reset
    QUOTA = "quota"  # it was pinned, and a request could not have run at all


class CacheCounts(NamedTuple):
    """Since the start: evicted blocks by reason. Now: blocks that only a pin holds."""

    room: int = 0
    ttl: int = 0
    dropped: int = 0
    quota: int = 0
    num_pinned_blocks: int = 0


@dataclass(frozen=True, slots=True)
class CachedText:
    """The KV of a text from its first token on: a prompt's full blocks, or all of a segment."""

    num_tokens: int
    hashes: tuple[bytes, ...]  # of its blocks, the last of which is full unless it is a segment
    is_segment: bool = False

    def num_tokens_in(self, num_blocks: int, block_size: int) -> int:
        """Tokens in its first blocks."""
        return min(num_blocks * block_size, self.num_tokens)


@dataclass(frozen=True, slots=True)
class LookUp:
    """How much of a text is there, and of segments of it that may stand elsewhere too. Changes
    nothing, not even what is evicted next."""

    text: CachedText
    segments: tuple[CachedText, ...] = ()


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep a text's KV, what is computed later too: from being evicted, or, with a priority, from
    being evicted before that of a lower one. Until the time is over, an Unpin, or a restart."""

    tenant: bytes
    text: CachedText
    ttl_s: float | None = None
    priority: int | None = None

    def check(self) -> None:
        """Raises InvalidRequest for what no pin can mean."""
        if not self.text.hashes:
            raise InvalidRequest(
                "prompt", f"its {self.text.num_tokens} tokens fill no block, so none is ever kept"
            )
        if self.ttl_s is not None and not 0 < self.ttl_s <= MAX_TTL_S:
            raise InvalidRequest("ttl_s", f"must be above 0 and at most {MAX_TTL_S:.0f} seconds")
        if self.priority is not None and not MIN_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidRequest("priority", f"must be from {MIN_PRIORITY} to {MAX_PRIORITY}")


@dataclass(frozen=True, slots=True)
class Unpin:
    """End a pin, by its number or its text. What it kept stays until its block is needed."""

    tenant: bytes
    pin: "int | CachedText"


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a text's KV and end its pin; by the pin's number, or by the text."""

    tenant: bytes
    pin: "int | CachedText"


@dataclass(frozen=True, slots=True)
class ListPins:
    """The pins of a tenant whose number is above `after`, oldest first."""

    tenant: bytes
    after: int = 0
    limit: int = MAX_PAGE


CacheMessage = LookUp | Pin | Unpin | Drop | ListPins


Place = Literal["memory", "ram", "disk"]  # where requests read it, and the tiers behind that


class FoundRange(NamedTuple):
    """Tokens start ... end - 1 of a text, where they are, and how they are kept there."""

    start: int
    end: int
    priority: int | None  # None: pinned; or not in memory, where alone pins and priorities count
    tier: Place = "memory"

    @property
    def is_pinned(self) -> bool:
        return self.tier == "memory" and self.priority is None


@dataclass(frozen=True, slots=True)
class Found:
    """What a look-up found. `num_cached` tokens a request of this text would find in memory, and
    not compute; `num_loadable` more it could load from other tiers, which it does where that is
    cheaper than computing them."""

    num_tokens: int
    num_cached: int
    num_loadable: int
    ranges: tuple[FoundRange, ...]
    segments: tuple["Found", ...] = ()


@dataclass(frozen=True, slots=True)
class PinInfo:
    """A pin as its tenant sees it. A pin with a priority does not pin: it orders evictions."""

    number: int
    num_tokens: int
    num_blocks: int
    num_cached: int  # tokens that are there now; others are kept once they are computed
    is_segment: bool
    priority: int | None
    ttl_left_s: float | None
    age_s: float


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pin that was made, renewed or ended, with what its tenant keeps and may keep."""

    pin: PinInfo
    usage: "KeptBlocks"
    counts: CacheCounts


class KeptBlocks(NamedTuple):
    """Blocks that a tenant's pins keep, shared ones counted once, and how many they may."""

    num_kept: int
    quota: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """In blocks: forgotten in memory, of those still in use by requests, forgotten in RAM or on the
    disk, and kept as another pin has them."""

    num_dropped: int
    num_in_use: int
    num_in_tiers: int
    num_kept: int
    has_ended_pin: bool
    counts: CacheCounts


@dataclass(frozen=True, slots=True)
class PinPage:
    """Some pins of a tenant; there may be more behind them."""

    pins: Sequence[PinInfo]
    has_more: bool
    usage: KeptBlocks


CacheReply = Found | Pinned | Dropped | PinPage


class PinNotFound(InvalidRequest):
    """The tenant has no such pin."""

    def __init__(self) -> None:
        super().__init__("id", "no pin of this id or text is there")


class PinQuotaExceeded(InvalidRequest):
    """A pin would keep more than its tenant, or all tenants together, may. Nothing has changed."""
