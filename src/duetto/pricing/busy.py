"""Whether a machine had other work while it was measured, and how to say so.

Knows what was seen, and measures nothing itself but counters that the system keeps.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

MOST_SPREAD = 0.15  # of a roof between its measurements; quiet machines stay within a few percent
MOST_LOAD = 0.25  # of the CPUs, of what ran before it began
MOST_STEAL = 0.02  # of the CPUs' time, by other virtual machines
_STEAL = 7  # column of /proc/stat's first line, after its name
_STAT = Path("/proc/stat")

CpuTimes = tuple[float, float]  # stolen, and all; since the machine started


def load_average() -> float | None:
    """Processes that ran or waited to in the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def cpu_times(file: Path = _STAT) -> CpuTimes | None:
    """None where the system does not count (it is Linux that does)."""
    try:
        times = [float(word) for word in file.read_text().splitlines()[0].split()[1:9]]
        return times[_STEAL], sum(times)
    except (OSError, ValueError, IndexError):
        return None


def busy_notes(
    repeats: Mapping[str, Sequence[float]],
    *,
    num_cpus: int,
    load: float | None = None,
    before: CpuTimes | None = None,
    after: CpuTimes | None = None,
) -> tuple[str, ...]:
    """Why what was measured may be too slow, in words; nothing where the machine was quiet.

    `repeats` has each roof as it was measured again and again, `load` is from before.
    """
    found = []
    if load is not None and load > MOST_LOAD * num_cpus:
        found.append(f"before it began {load:.1f} processes ran on {num_cpus} CPUs")
    for name, values in repeats.items():
        lost = 1 - min(values) / max(values)
        if lost > MOST_SPREAD:
            found.append(
                f"{name} was {lost:.0%} lower at one time than at another "
                f"({len(values)} measurements)"
            )
    if before is not None and after is not None and after[1] > before[1]:
        stolen = (after[0] - before[0]) / (after[1] - before[1])
        if stolen > MOST_STEAL:
            found.append(f"other virtual machines took {stolen:.0%} of the CPUs' time")
    return tuple(found)
