"""How much longer a tokenizer's file may make a text: a bomb takes memory that no one can refuse.

The library ends the process where memory ends, so the file is judged before any text is.
"""

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.normalizers import Replace

from duetto.core.errors import CheckpointError

MAX_GROWTH = 64  # characters from one; a space that becomes ▁ is 1, with one in front 2
_INNER = ("normalizers", "pretokenizers", "decoders", "processors")
_MANY = 10**24  # no more is said
_BYTES = 4  # of a character, at most
_SAMPLE = "".join(map(chr, range(1, 0x250)))


def check_growth(file: Path, **parts: Any) -> None:
    """Raise CheckpointError if a part (normalizer, ...) replaces characters by too many."""
    for name, part in parts.items():
        growth = 1 if part is None else _growth(name, json.loads(part.__getstate__()))
        if growth > MAX_GROWTH:
            raise CheckpointError(
                file,
                f"its {name} may make {growth:,} characters of one; at most {MAX_GROWTH} are "
                "accepted",
            )


def _growth(name: str, written: Any) -> int:
    """The product of what each part does, at most."""
    growth, left = 1, [written]
    while left:
        part = left.pop()
        for key in _INNER:
            left += part.get(key, ())
        match part["type"]:
            case "Replace":
                growth *= max(1, len(part["content"]) + _matches_nothing(part["pattern"]))
            case "Prepend":
                growth *= 1 + len(part["prepend"])
            case "ByteLevel" if name in ("normalizer", "pre_tokenizer"):
                growth *= _BYTES
            case "Precompiled":
                growth *= _longest_replacement(part["precompiled_charsmap"])
            case "TemplateProcessing":
                growth *= max(1, sum("Sequence" in piece for piece in part["single"]))
        growth = min(growth, _MANY)
    return growth


def _matches_nothing(pattern: dict[str, str]) -> bool:
    """Whether a pattern is found between two characters, so that both stay."""
    if "Regex" not in pattern:
        return pattern == {"String": ""}
    replaced = Replace(Regex(pattern["Regex"]), "\0").normalize_str(_SAMPLE)
    return len(replaced) > len(_SAMPLE)


def _longest_replacement(charsmap: str) -> int:
    """Characters of the longest text in a map of sentencepiece's, which lie behind its trie."""
    data = b64decode(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))
