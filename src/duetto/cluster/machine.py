"""Whether two processes are on one machine, and have one clock."""

from functools import cache
from pathlib import Path
from uuid import uuid4

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux: another one after each start


@cache
def boot_id() -> str:
    """The same in all processes of this start of this machine; time.monotonic then is, too."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return uuid4().hex  # nobody else's: clocks are compared by heartbeats
