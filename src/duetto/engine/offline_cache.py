"""What an LLM's KV cache holds of a text, and what it keeps of it: `/v1/cache`, in this process.

Knows no HTTP and no tenants: all prompts of a process are one's, apart by their salts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duetto.core.cache_control import (
    CachedText,
    CacheMessage,
    CacheReply,
    Drop,
    Dropped,
    Found,
    ListPins,
    LookUp,
    Pin,
    PinInfo,
    Pinned,
    PinPage,
    Unpin,
)
from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest
from duetto.core.text import TextCodec
from duetto.engine.intake import MeantText, meant_text
from duetto.engine.prompts import Prompt, read_prompt
from duetto.engine.segments import SegmentedIds, encode_segments, read_segments

SEGMENT = "segment"
_OURS = b""  # the one tenant


class OfflineCache:
    """`LLM.cache`. A text is a prompt, as `LLM.generate` takes it, or {"segment": text or ids},
    which is tokenized alone and may stand anywhere; with the cache_salt of its prompts.

    Of a prompt full blocks are kept, of a segment all. Raises InvalidRequest, and has then changed
    nothing, for what is no text, and without a prefix cache.
    """

    def __init__(
        self,
        codec: TextCodec,
        config: SchedulerConfig,
        ask: Callable[[CacheMessage], CacheReply],
    ) -> None:
        self._codec = codec
        self._config = config
        self._ask = ask

    def lookup(self, text: Prompt) -> Found:
        """How much of a text is there, and of each reusable segment of a prompt. Changes nothing,
        not even what is evicted next."""
        meant = self._meant(text)
        found = self._ask(LookUp(meant.text, meant.segments))
        assert isinstance(found, Found)
        return found

    def pin(
        self, text: Prompt, *, ttl_s: float | None = None, priority: int | None = None
    ) -> PinInfo:
        """Keep a text's KV, what is computed later too; for `ttl_s` seconds, or until `unpin`. With
        a priority (0 to 100; others have 35) it is not kept, but goes after what has a lower one.
        The same text again renews its pin. Raises PinQuotaExceeded beyond what may be kept."""
        made = self._ask(Pin(_OURS, self._own(text), _number("ttl_s", ttl_s), _whole(priority)))
        assert isinstance(made, Pinned)
        return made.pin

    def unpin(self, pin: PinInfo | Prompt) -> PinInfo:
        """End a pin; what it kept stays until its blocks are needed. Raises PinNotFound."""
        ended = self._ask(Unpin(_OURS, self._pin_or_text(pin)))
        assert isinstance(ended, Pinned)
        return ended.pin

    def drop(self, pin: PinInfo | Prompt) -> Dropped:
        """Forget a text's KV, and end its pin. What another pin holds stays."""
        dropped = self._ask(Drop(_OURS, self._pin_or_text(pin)))
        assert isinstance(dropped, Dropped)
        return dropped

    def pins(self) -> list[PinInfo]:
        """All pins, oldest first."""
        found: list[PinInfo] = []
        while True:
            page = self._ask(ListPins(_OURS, found[-1].number if found else 0))
            assert isinstance(page, PinPage)
            found += page.pins
            if not page.has_more:
                return found

    def _pin_or_text(self, pin: PinInfo | Prompt) -> int | CachedText:
        return pin.number if isinstance(pin, PinInfo) else self._own(pin)

    def _own(self, text: Prompt) -> CachedText:
        meant = self._meant(text)
        if meant.segments:
            words = "what is reusable is kept and dropped one by one, each as {'segment': ...}"
            raise InvalidRequest("segments", words)
        return meant.text

    def _meant(self, text: Prompt) -> MeantText:
        is_segment = isinstance(text, Mapping) and SEGMENT in text
        try:
            ids, salt = self._segment(text) if is_segment else self._prompt(text)
            return meant_text(
                ids,
                codec=self._codec,
                config=self._config,
                cache_salt=salt,
                is_segment=is_segment,
            )
        except InvalidRequest as error:
            if not is_segment or error.field not in ("prompt", "segments[0]"):
                raise
            raise InvalidRequest(SEGMENT, error.message) from None

    def _prompt(self, text: Prompt) -> tuple[SegmentedIds, bytes]:
        read = read_prompt(text, self._codec)
        return SegmentedIds(tuple(read.token_ids), read.reusable), read.cache_salt

    def _segment(self, text: Any) -> tuple[SegmentedIds, bytes]:
        salt = text.get("cache_salt", "")
        if not text.keys() <= {SEGMENT, "cache_salt"} or not isinstance(salt, str):
            words = f"takes a cache_salt beside it, and no more: {text!r:.80}"
            raise InvalidRequest(SEGMENT, words)
        if not isinstance(text[SEGMENT], str | Sequence):
            raise InvalidRequest(SEGMENT, f"must be a text or token ids, not {text[SEGMENT]!r:.60}")
        segments = read_segments([text[SEGMENT]])
        return encode_segments(self._codec, segments, add_special_tokens=False), salt.encode()


def _number(field: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(field, f"must be a number of seconds, not {value!r:.60}")
    return float(value)


def _whole(value: object) -> int | None:
    if value is None or type(value) is int:
        return value
    raise InvalidRequest("priority", f"must be a whole number, not {value!r:.60}")
