"""How many processors this process may use, on any system."""

import os


def usable_cpus() -> int:
    """Those it may run on; where the system does not say (macOS, Windows), those that there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
