"""KV that moved between engines, as numbers that cross with the records of steps."""

from typing import NamedTuple


class KVTransfers(NamedTuple):
    """What came, what went and what did not, since the last record that said so."""

    num_bytes_in: int = 0  # of KV that came, also of what was given up later
    num_bytes_out: int = 0
    num_imported: int = 0  # prompts whose KV came from another engine
    num_exported: int = 0  # prompts computed for another engine, which has them
    num_refused: int = 0  # asks that were refused here
    num_failed: int = 0  # asks that were accepted here, and not carried through
    exposed_s: float = 0.0  # of those exported: from the end of prefill to when all had arrived
    num_alarms: int = 0  # times that nothing came for long, though it was asked for
    local: tuple[tuple[str, int], ...] = ()  # prompts computed at home, by the reason
