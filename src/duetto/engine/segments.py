"""A prompt as segments: each is tokenized alone, and the ids are joined.

So a text has the same ids wherever it stands, and where it stands is known without looking for it.
Both doors come through here. Knows no HTTP, no templates and no KV.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from duetto.core.errors import InvalidRequest
from duetto.core.reuse import TokenRange
from duetto.core.text import TextCodec

SEGMENT = "a text, token ids, or an object of text or token_ids, and reusable"
_KEYS = {"text", "token_ids", "reusable"}


class PromptSegment(NamedTuple):
    content: str | Sequence[int]
    is_reusable: bool = False


class SegmentedIds(NamedTuple):
    token_ids: tuple[int, ...]
    reusable: tuple[TokenRange, ...]  # where the segments are that may be reused


def encode_segments(
    codec: TextCodec, segments: Sequence[PromptSegment], *, add_special_tokens: bool = True
) -> SegmentedIds:
    """What the tokenizer adds to a text of its own account (BOS, EOS) stands once, outside of all
    segments: where the first is a text before it, and where the last is one after it.

    Raises InvalidRequest if the model cannot read a text.
    """
    ids: list[int] = []
    reusable: list[TokenRange] = []
    is_text = [isinstance(segment.content, str) for segment in segments]
    for index, segment in enumerate(segments):
        before, own, after = _apart(codec, segment.content)
        if add_special_tokens and index == 0 and is_text[0]:
            ids += before
        if own and segment.is_reusable:
            reusable.append(TokenRange(len(ids), len(ids) + len(own)))
        ids += own
        if add_special_tokens and index == len(segments) - 1 and is_text[-1]:
            ids += after
    return SegmentedIds(tuple(ids), tuple(reusable))


def read_segments(given: object) -> list[PromptSegment]:
    """Segments as callers in this process write them. Raises InvalidRequest, naming the one."""
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise InvalidRequest("segments", f"must be a list, each {SEGMENT}, not {given!r:.60}")
    return [_read(f"segments[{index}]", each) for index, each in enumerate(given)]


def _read(field: str, given: Any) -> PromptSegment:
    is_reusable, content = False, given
    if isinstance(given, Mapping):
        texts = [given[key] for key in ("text", "token_ids") if given.get(key) is not None]
        if len(texts) != 1 or not given.keys() <= _KEYS:
            raise InvalidRequest(field, f"must be {SEGMENT}, not {given!r:.60}")
        (content,), is_reusable = texts, given.get("reusable", False)
        if not isinstance(is_reusable, bool):
            raise InvalidRequest(f"{field}.reusable", f"must be a bool, not {is_reusable!r:.60}")
    is_ids = isinstance(content, Sequence) and all(type(i) is int for i in content)
    if not isinstance(content, str) and not is_ids:
        raise InvalidRequest(field, f"must be {SEGMENT}, not {content!r:.60}")
    return PromptSegment(content, is_reusable)


def _apart(
    codec: TextCodec, content: str | Sequence[int]
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    return codec.encode_apart(content) if isinstance(content, str) else ((), content, ())
