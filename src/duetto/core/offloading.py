"""What `--kv-offloading-...` mean, to an engine that runs and to one that is simulated."""

from duetto.core.errors import ConfigError

GIB = 2**30
DISK_GIB = 10.0  # that files may take, where nothing else is said
SHARE = 8  # of the arena's blocks, one in so many is RAM for a disk to load through, at least
LEAST_SLOTS = 4
WAIT_S = 0.05  # for the disk, before the engine reads what came in


def max_queued_bytes(block_bytes: int) -> int:
    """To be written to the disk; what comes beyond is refused, and a chain of blocks ends at the
    first that is missing. So there is room for some blocks of a large model too."""
    return max(64 << 20, min(1 << 30, 16 * block_bytes))


def num_ram_slots(size_gib: float | None, num_blocks: int, block_bytes: int, longest: int) -> int:
    """Blocks of RAM beside an arena: as was asked for, or enough for a disk to load a request of
    `longest` blocks through, if that is no more than half of the arena. Raises ConfigError, naming
    the flag, for what holds too little to be of use."""
    if size_gib is None:
        return max(LEAST_SLOTS, num_blocks // SHARE, min(longest, num_blocks // 2))
    num_slots = int(size_gib * GIB) // block_bytes
    if num_slots < LEAST_SLOTS:
        least = LEAST_SLOTS * block_bytes
        raise ConfigError(
            f"--kv-offloading-size {size_gib}: must hold {LEAST_SLOTS} blocks of "
            f"{block_bytes} bytes, which are {least / GIB:.6f} GiB"
        )
    return num_slots
