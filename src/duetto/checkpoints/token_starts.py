"""Where in a text each of its tokens begins, from the offsets that the `tokenizers` library keeps.

The library knows what a normalizer and a pre-tokenizer did to the text, so a dummy space in front,
a composed character or a special token that was spelt need no second look.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import processors


def token_starts(offsets: Sequence[tuple[int, int]], text: str) -> list[int]:
    """Where in `text` each token begins, such that the tokens tile it.

    `offsets` are (start, end) in characters. Tokens that are parts of one character begin where it
    does. Spaces that no token covers (a tokenizer drops them) belong to the token after them, other
    characters (an accent that was composed or removed) to the one before, and what follows the last
    token to it. A token that stands for no text begins where the text before it ends.
    """
    starts: list[int] = []
    last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1)
    reached, previous = 0, 0
    for index, (start, end) in enumerate(offsets):
        if index > last:
            previous = len(text) if last >= 0 else 0
        elif end > start:
            begins = min(start, reached + len(text[reached:start].rstrip()))
            previous = max(previous, begins)
        else:
            previous = max(previous, reached)
        reached = max(reached, end)
        starts.append(previous)
    return starts


def keep_offsets(processor: Any) -> Any:
    """The post-processor, not taking the spaces at a token's ends out of its offsets.

    That is all that `trim_offsets` does; the ids are the same.
    """
    if processor is None:
        return None
    written = json.loads(processor.__getstate__())
    parts, trimming = [written], []
    while parts:
        part = parts.pop()
        trimming += [part] if part.get("trim_offsets") else []
        parts += part.get("processors", ())
    if not trimming:
        return processor
    for part in trimming:
        part["trim_offsets"] = False
    kept = processors.ByteLevel()  # takes any state, and with it the type
    kept.__setstate__(json.dumps(written).encode())
    return kept
