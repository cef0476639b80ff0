"""Typed reading of a checkpoint's JSON files: every refusal names the file and the key.

Knows no model: which keys there are, and what they mean, is the reader's business.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown  # of any value, a line that is not long
from typing import Any, NoReturn

from duetto.checkpoints.checkpoint_file import read_text_part
from duetto.core.errors import CheckpointError

MAX_INTEGER = 2**31 - 1
# Wide of every constant of a model, and so far inside floating point that no formula leaves it.
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e30
_POSITIVE = f"above 0 ({MIN_NUMBER:g} to {MAX_NUMBER:g})"
_MAX_DIGITS = 300  # that are read as an integer; a float holds as many


@dataclass(frozen=True, slots=True)
class JsonSection:
    """One JSON object. A key that is null counts as absent, as it does for transformers."""

    file: Path
    values: Mapping[str, Any]
    prefix: str = ""  # of the keys in messages: "rope_scaling."

    def refuse(self, key: str, why: str) -> NoReturn:
        raise CheckpointError(self.file, f"{self.prefix}{key}: {why}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def integer(
        self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        """A whole number in this range; without a default the key must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.refuse(
                key, f"must be a whole number from {minimum} to {maximum}, not {shown(value)}"
            )
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A number from MIN_NUMBER to MAX_NUMBER; without a default the key must be there."""
        value = self._value(key, default)
        if not _is_positive(value):
            self.refuse(key, f"must be a number {_POSITIVE}, not {shown(value)}")
        return float(value)

    def optional_positive(self, key: str) -> float | None:
        return None if self.get(key) is None else self.positive(key)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"must be true or false, not {shown(value)}")
        return value

    def choice(self, key: str, accepted: tuple[str, ...], default: str | None = None) -> str:
        value = self._value(key, default)
        if value not in accepted:
            self.refuse(key, f"{shown(value)} is not supported; accepted: {', '.join(accepted)}")
        return str(value)

    def positives(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers, each as `positive` has it."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != length or not all(map(_is_positive, value)):
            self.refuse(key, f"must be a list of {length} numbers {_POSITIVE}")
        return tuple(float(number) for number in value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none if the key is absent."""
        value = self.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in values:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                self.refuse(key, f"must be a token id or a list of them, not {shown(value)}")
        return tuple(values)

    def section(self, key: str) -> "JsonSection | None":
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, f"must be an object, not {shown(value)}")
        return JsonSection(self.file, value, f"{self.prefix}{key}.")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            self.refuse(key, "is missing")
        return value


def read_json(file: Path) -> JsonSection:
    """Raises CheckpointError if `file` is missing, is no file or holds no JSON object."""
    try:
        values = json.loads(read_text_part(file), parse_int=_parse_integer)
    except json.JSONDecodeError as error:
        raise CheckpointError(file, f"is not valid JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(file, "is nested too deep") from None
    if not isinstance(values, dict):
        raise CheckpointError(file, "must hold a JSON object")
    return JsonSection(file, values)


def _parse_integer(text: str) -> int | float:
    """Python refuses to read an integer of thousands of digits, and would not say of which key.

    As a float (an infinite one, most likely) it reaches the key's reader, who refuses it by name.
    """
    return int(text) if len(text) <= _MAX_DIGITS else float(text)


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and MIN_NUMBER <= value <= MAX_NUMBER
