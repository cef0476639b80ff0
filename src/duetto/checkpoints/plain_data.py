"""Data of a client, copied in JSON's own types, and bounded: what a chat template is given.

The sandbox guards these types, not the methods of others.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, NoReturn

from duetto.core.errors import InvalidRequest

MAX_DEPTH = 16
_MAX_VALUES = 200_000
_MAX_INTEGER = 2**63


class PlainData:
    """Copies the values of one field, which errors name."""

    def __init__(self, field: str, max_depth: int = MAX_DEPTH) -> None:
        self._field = field
        self._max_depth = max_depth
        self._num_values = 0

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Raises InvalidRequest for what JSON cannot say, and for more than is reasonable."""
        return {str(key): self._value(value, 1) for key, value in values.items()}

    def _value(self, value: Any, depth: int) -> Any:
        self._num_values += 1
        if depth > self._max_depth:
            self._refuse(f"is nested more than {self._max_depth} deep")
        if self._num_values > _MAX_VALUES:
            self._refuse(f"holds more than {_MAX_VALUES} values")
        if value is None or type(value) in (str, bool):
            return value
        if type(value) in (int, float):
            if not (abs(value) < _MAX_INTEGER if type(value) is int else isfinite(value)):
                self._refuse("holds a number that is too large, or none")
            return value
        if isinstance(value, Mapping):
            return {str(key): self._value(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item, depth + 1) for item in value]
        return self._refuse(f"must be what JSON can say, not {type(value).__name__}")

    def _refuse(self, why: str) -> NoReturn:
        raise InvalidRequest(self._field, why)
