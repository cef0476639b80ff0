"""What transfers of KV came to, as numbers, and the alarm when nothing moves. Knows no link."""

import logging
from dataclasses import dataclass, field
from typing import Any

from duetto.core.batch import StepRecord
from duetto.core.kv_transfers import KVTransfers

logger = logging.getLogger(__name__)

ALARM_AFTER_S = 60.0
_NOTHING = KVTransfers()
_NUMBERS = KVTransfers._fields[:-1]


@dataclass(slots=True)
class TransferCounts:
    """Since the start; named as in KVTransfers. Each is written by one thread at a time."""

    num_bytes_in: int = 0
    num_bytes_out: int = 0
    num_imported: int = 0
    num_exported: int = 0
    num_refused: int = 0
    num_failed: int = 0
    exposed_s: float = 0.0
    num_alarms: int = 0
    local: dict[str, int] = field(default_factory=dict)
    _told: KVTransfers = _NOTHING

    def note_local(self, reason: str) -> None:
        """A prompt is computed at home."""
        self.local[reason] = self.local.get(reason, 0) + 1

    def told_by(self, record: StepRecord | None) -> StepRecord | None:
        """A step's record, with what is new."""
        new = None if record is None else self.since_told()
        return record if record is None or new is None else record._replace(transfers=new)

    def since_told(self) -> KVTransfers | None:
        """What is new since this was asked last; None: nothing. On the engine's thread."""
        before, self._told = self._told, self._now()
        if self._told == before:
            return None
        new: dict[str, Any] = {
            name: getattr(self._told, name) - getattr(before, name) for name in _NUMBERS
        }
        old = dict(before.local)
        local = [(reason, n - old.get(reason, 0)) for reason, n in self._told.local]
        return KVTransfers(**new, local=tuple(local))

    def _now(self) -> KVTransfers:
        numbers: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        return KVTransfers(**numbers, local=tuple(self.local.items()))


class MovementAlarm:
    """Says so, once, when prompts were to be computed elsewhere and no KV has come for long."""

    def __init__(self, counts: TransferCounts, after_s: float = ALARM_AFTER_S) -> None:
        self._counts = counts
        self._after_s = after_s
        self._num_bytes = 0
        self._since: float | None = None  # when the first was asked for in vain
        self._is_on = False

    def asked(self, now: float) -> None:
        """A prompt was to be computed elsewhere."""
        counts = self._counts
        if counts.num_bytes_in != self._num_bytes:
            if self._is_on:
                logger.warning("KV comes from other engines again")
            self._num_bytes, self._since, self._is_on = counts.num_bytes_in, now, False
        elif self._since is None:
            self._since = now
        elif not self._is_on and now - self._since >= self._after_s:
            self._is_on = True
            counts.num_alarms += 1
            reasons = [f"{why} ({number})" for why, number in sorted(counts.local.items())]
            logger.error(
                "no KV has come from another engine for %.0f s, though prompts were to be computed "
                "there; they are computed here. Reasons so far: %s",
                now - self._since,
                ", ".join(reasons) or "none",
            )
