"""How much longer a tokenizer's file may make a text: a bomb takes memory that no one can refuse.

The library ends the process where memory ends, so the file is judged before any text is.
"""

import json
from pathlib import Path
from typing import Any

from duetto.core.errors import CheckpointError

MAX_GROWTH = 64  # characters from one; a space that becomes ▁ is 1, with one in front 2


def check_growth(file: Path, **parts: Any) -> None:
    """Raise CheckpointError if a part (normalizer, decoder) replaces characters by too many."""
    for name, part in parts.items():
        growth = 1 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MAX_GROWTH:
            raise CheckpointError(
                file,
                f"its {name} may make {growth:,} characters of one; at most {MAX_GROWTH} are "
                "accepted",
            )


def _growth(written: Any) -> int:
    """The product of what each part does, at most."""
    growth, left = 1, [written]
    while left:
        part = left.pop()
        left += [*part.get("normalizers", ()), *part.get("decoders", ())]
        if part["type"] == "Replace":
            growth *= max(1, len(part["content"]) + (part["pattern"] == {"String": ""}))
        elif part["type"] == "Prepend":
            growth *= 1 + len(part["prepend"])
    return growth
