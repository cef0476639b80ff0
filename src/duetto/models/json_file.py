"""Typed reading of a checkpoint's JSON files: every refusal names the file and the key.

Knows no model: which keys there are, and what they mean, is the reader's business.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from duetto.core.errors import CheckpointError


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

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; without a default the key must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(key, f"must be a whole number of at least {minimum}, not {value!r}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; without a default the key must be there."""
        value = self._value(key, default)
        if not _is_number(value) or value <= 0:
            self.refuse(key, f"must be a number above 0, not {value!r}")
        return float(value)

    def optional_positive(self, key: str) -> float | None:
        return None if self.get(key) is None else self.positive(key)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"must be true or false, not {value!r}")
        return value

    def choice(self, key: str, accepted: tuple[str, ...], default: str | None = None) -> str:
        value = self._value(key, default)
        if value not in accepted:
            self.refuse(key, f"{value!r} is not supported; accepted: {', '.join(accepted)}")
        return str(value)

    def positives(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers above 0."""
        value = self._value(key, None)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(_is_number(number) and number > 0 for number in value)
        ):
            self.refuse(key, f"must be a list of {length} numbers above 0")
        return tuple(float(number) for number in value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none if the key is absent."""
        value = self.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in values:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                self.refuse(key, f"must be a token id or a list of them, not {value!r}")
        return tuple(values)

    def section(self, key: str) -> "JsonSection | None":
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, f"must be an object, not {value!r}")
        return JsonSection(self.file, value, f"{self.prefix}{key}.")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            self.refuse(key, "is missing")
        return value


def read_json(file: Path) -> JsonSection:
    """Raises CheckpointError if `file` is missing or holds no JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(file, "is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(file, f"cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(file, f"is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(file, "must hold a JSON object")
    return JsonSection(file, values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
