"""What transfers of KV came to, as numbers, and the alarm when nothing moves. Knows no link."""

import logging
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

ALARM_AFTER_S = 60.0


@dataclass(slots=True)
class TransferCounts:
    """Since the start. Written on several threads, each number on one."""

    num_bytes_in: int = 0  # of KV that came, also of what was given up later
    num_bytes_out: int = 0
    num_imported: int = 0  # prompts whose KV came from another engine
    num_exported: int = 0  # prompts computed for another engine, which has them
    num_refused: int = 0  # asks that were refused here
    num_failed: int = 0  # asks that were accepted here, and not carried through
    exposed_s: float = 0.0  # of those exported: from the end of prefill to when all had arrived
    local: dict[str, int] = field(default_factory=dict)  # prompts computed here, by the reason
    num_alarms: int = 0

    def note_local(self, reason: str) -> None:
        self.local[reason] = self.local.get(reason, 0) + 1


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
            logger.error(
                "no KV has come from another engine for %.0f s, though prompts were to be "
                "computed there; they are computed here. Reasons so far: %s",
                now - self._since,
                ", ".join(f"{why} ({n})" for why, n in sorted(counts.local.items())) or "none",
            )
