"""How much memory this process may still take: the machine's and its control groups' limits.

Reads Linux's text files, each of which may be missing. Knows nothing of what the memory is for.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_GIB = 2**30
_UNKNOWN_BYTES = 4 * _GIB  # where nothing can be read, a size that most machines have


def available_memory_bytes(root: Path = Path("/")) -> int:
    """The least of what the machine has left and what each enclosing control group has left.

    Memory that the kernel would give back under pressure (page cache) counts as left. Where there
    is no /proc/meminfo, half of the physical memory is taken as left; where not even that is known,
    4 GiB. `root` is where /proc and /sys are looked for.
    """
    machine = _meminfo_available(root / "proc/meminfo")
    if machine is None:
        machine = _half_of_physical()
    return max(0, min([machine, *_cgroup_headrooms(root)]))


def _meminfo_available(file: Path) -> int | None:
    for line in _read(file).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # given in kB
    return None


def _half_of_physical() -> int:
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no sysconf, or not these names
        return _UNKNOWN_BYTES
    return physical // 2 if physical > 0 else _UNKNOWN_BYTES


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """What is left in each control group, version 1 or 2, that holds this process and has a limit.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max) and cgroup-v1/memory.html.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for group in _with_ancestors(mount, path):
                yield from _headroom(group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for group in _with_ancestors(mount / "memory", path):
                yield from _headroom(
                    group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                )


def _with_ancestors(mount: Path, path: str) -> Iterator[Path]:
    """The group's directory and those above it. In a container, often only the mount exists."""
    relative = Path(path.lstrip("/"))
    for group in (relative, *relative.parents):
        yield mount / group


def _headroom(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """limit - (usage - page cache), if the group has a limit ("max" is none)."""
    limit_text, usage_text = _read(group / limit).strip(), _read(group / usage).strip()
    if not limit_text.isdecimal() or not usage_text.isdecimal():
        return
    cache = 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == reclaimable:
            cache = int(value)
    yield int(limit_text) - (int(usage_text) - cache)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # not this system, not this version of control groups, or not ours to read
        return ""
