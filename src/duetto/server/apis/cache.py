"""The bodies of /v1/cache and what answers them. Names are others' where they have some: lookup and
pin LMCache's, ttl Gemini's and Anthropic's, priority TensorRT-LLM's (0 to 100, the low go first).

Plain functions; they know no engine, no HTTP and no tokenizer.
"""

import re
from collections.abc import Sequence
from typing import Any

from duetto.core.cache_control import (
    DEFAULT_PRIORITY,
    Dropped,
    Found,
    FoundRange,
    KeptBlocks,
    PinInfo,
    Pinned,
    PinPage,
)
from duetto.core.reuse import TokenRange
from duetto.engine.segments import PromptSegment
from duetto.server.apis.prompts import segments_of
from duetto.server.apis.protocol import (
    Documents,
    Features,
    Label,
    Messages,
    SegmentedPrompt,
    TokenizeRequest,
)
from duetto.server.http.errors import invalid
from duetto.server.http.json_parts import Json

_PIN_ID = re.compile(r"pin-([1-9][0-9]{0,15})", re.ASCII)


class CacheTextRequest(Features, kw_only=True):
    """Whose KV is meant: of a prompt, as /v1/completions or /v1/chat/completions reads it, or of a
    segment, which is tokenized alone."""

    model: str | None = None
    prompt: str | list[int] | SegmentedPrompt | None = None
    messages: Messages | None = None
    documents: Documents | None = None  # type: ignore[assignment]  # which completions refuse
    segment: str | list[int] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    cache_salt: str | None = None
    user: Label = None


class PinRequest(CacheTextRequest, kw_only=True):
    ttl_s: float | None = None
    priority: int | None = None


class PinOrTextRequest(CacheTextRequest, kw_only=True):
    """A pin by its id, or a text."""

    id: str | None = None


_TEXTS = ("prompt", "messages", "segment")


def named_text(wire: CacheTextRequest) -> str | None:
    """The field that says whose KV is meant; None if a pin's id does."""
    names = _TEXTS if not isinstance(wire, PinOrTextRequest) else ("id", *_TEXTS)
    given = [name for name in names if getattr(wire, name) is not None]
    if len(given) != 1:
        among = f"{', '.join(names[:-1])} and {names[-1]}"
        raise invalid(given[1] if given else names[0], f"exactly one of {among} is needed")
    if given[0] == "id":
        if wire.cache_salt is not None:
            raise invalid("cache_salt", "is for a text; a pin's id says all")
        return None
    if isinstance(wire.prompt, SegmentedPrompt) and isinstance(wire, PinRequest | PinOrTextRequest):
        raise invalid("prompt", "segments are kept and dropped one by one: send each as segment")
    return given[0]


def token_ids_of(wire: CacheTextRequest) -> list[int] | None:
    """The ids that were sent; None if it is a text that must be tokenized."""
    sent = wire.segment if wire.segment is not None else wire.prompt
    if not isinstance(sent, list):
        return None
    if wire.add_special_tokens is not None:
        raise invalid("add_special_tokens", "is for texts; token ids stay as they are")
    _check_no_template(wire)
    return sent


def segments_sent(wire: CacheTextRequest) -> tuple[PromptSegment, ...]:
    """The segments of a prompt; () if it has none."""
    if not isinstance(wire.prompt, SegmentedPrompt):
        return ()
    _check_no_template(wire)
    return segments_of(wire.prompt, "prompt")


def segment_of(wire: CacheTextRequest) -> str | None:
    """The text of a segment; None if it is not one."""
    if not isinstance(wire.segment, str):
        return None
    if wire.add_special_tokens:
        raise invalid("add_special_tokens", "a segment has none: it may stand anywhere")
    _check_no_template(wire)
    return wire.segment


def tokenize_request(wire: CacheTextRequest) -> TokenizeRequest:
    """How a prompt's text, or messages, become ids."""
    return TokenizeRequest(
        prompt=wire.prompt if isinstance(wire.prompt, str) else None,
        messages=wire.messages,
        documents=wire.documents,
        add_special_tokens=wire.add_special_tokens,
        add_generation_prompt=wire.add_generation_prompt,
        chat_template_kwargs=wire.chat_template_kwargs,
        reasoning_effort=wire.reasoning_effort,
    )


def _check_no_template(wire: CacheTextRequest) -> None:
    for name in ("add_generation_prompt", "chat_template_kwargs", "reasoning_effort", "documents"):
        if getattr(wire, name) is not None:
            raise invalid(name, "is for messages; nothing else has a template")


def pin_number(pin_id: str) -> int:
    """0, which no pin has, for what is no pin's id."""
    found = _PIN_ID.fullmatch(pin_id)
    return int(found.group(1)) if found else 0


def found_reply(found: Found, places: Sequence[TokenRange] = ()) -> Json:
    """`places`: where the segments of `found` stand in it."""
    segments = [
        {"start": start, "end": end, **_found(segment)}
        for (start, end), segment in zip(places, found.segments, strict=True)
    ]
    more: Json = {"segments": segments} if segments else {}
    return {"object": "cache.lookup", **_found(found), **more}


def _found(found: Found) -> Json:
    return {
        "num_tokens": found.num_tokens,
        "cached_tokens": found.num_cached,
        "loadable_tokens": found.num_loadable,
        "ranges": [_range(one) for one in found.ranges],
    }


def _range(one: FoundRange) -> Json:
    return {
        "start": one.start,
        "end": one.end,
        "tier": one.tier,
        "exact": True,  # what is approximate is never found
        "pinned": one.is_pinned,
        "priority": one.priority,
    }


def pin_reply(made: Pinned) -> Json:
    return {**_pin(made.pin), **_usage(made.usage)}


def unpinned_reply(ended: Pinned) -> Json:
    return {**_pin(ended.pin), "deleted": True, **_usage(ended.usage)}


def dropped_reply(dropped: Dropped) -> Json:
    return {
        "object": "cache.drop",
        "dropped_blocks": dropped.num_dropped,
        "in_use_blocks": dropped.num_in_use,
        "tier_blocks": dropped.num_in_tiers,
        "pinned_blocks": dropped.num_kept,
        "unpinned": dropped.has_ended_pin,
    }


def page_reply(page: PinPage, block_size: int) -> Json:
    return {
        "object": "list",
        "data": [_pin(pin) for pin in page.pins],
        "has_more": page.has_more,
        "block_size": block_size,
        "default_priority": DEFAULT_PRIORITY,
        **_usage(page.usage),
    }


def _usage(usage: KeptBlocks) -> Json:
    return {"kept_blocks": usage.num_kept, "max_kept_blocks": usage.quota}


def _pin(pin: PinInfo) -> Json:
    return {
        "object": "cache.pin",
        "id": f"pin-{pin.number}",
        "pinned": pin.priority is None,
        "priority": pin.priority,
        "segment": pin.is_segment,
        "num_tokens": pin.num_tokens,
        "num_blocks": pin.num_blocks,
        "cached_tokens": pin.num_cached,
        "ttl_s": None if pin.ttl_left_s is None else round(pin.ttl_left_s, 3),
        "age_s": round(pin.age_s, 3),
    }
