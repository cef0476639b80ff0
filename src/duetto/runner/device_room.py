"""What a model takes of a device's own memory, and whether there is room. Allocates nothing."""

from duetto.core.errors import ConfigError
from duetto.program.dtype import KVDtype
from duetto.program.kv_size import KVPlan
from duetto.runner.loaders import Loader


def device_needs(loader: Loader, block_size: int, kv_dtype: KVDtype) -> str:
    """What takes a device's memory beside KV, to end a sentence about it; nothing for the host."""
    if loader.memory is None:
        return ""
    name, _, usable = loader.memory
    return f" ({name}: {_gib(usable)} may be used, {_beside(loader, block_size, kv_dtype)})"


def device_note(loader: Loader, block_size: int, kv_dtype: KVDtype, kv: KVPlan) -> str:
    """For people: where memory went."""
    assert loader.memory is not None
    name, total, usable = loader.memory
    return (
        f"{name}: of {_gib(total)}, {_gib(usable)} may be used (--gpu-memory-utilization); the KV "
        f"cache takes {_gib(kv.memory_bytes)}, {_beside(loader, block_size, kv_dtype)}"
    )


def check_room(loader: Loader, block_size: int, kv_dtype: KVDtype, kv: KVPlan) -> None:
    """Raise ConfigError, with the numbers, for KV that was asked for and does not fit."""
    if loader.memory is None:
        return
    left = loader.memory.usable_bytes - loader.weight_bytes
    left -= loader.held_bytes(block_size, kv_dtype)
    if kv.memory_bytes > left:
        raise ConfigError(
            f"--kv-cache-memory-bytes: {_gib(kv.memory_bytes)} are more than the "
            f"{_gib(max(0, left))} that are left{device_needs(loader, block_size, kv_dtype)}; give "
            f"less, or raise --gpu-memory-utilization"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host, or of a device, whose error has a class that is not known here: torch's."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def who_refuses(loader: Loader) -> str:
    if loader.memory is None:
        return "the system refuses"
    return f"{loader.memory.device}, or who else uses it (--gpu-memory-utilization), refuses"


def _beside(loader: Loader, block_size: int, kv_dtype: KVDtype) -> str:
    held = loader.held_bytes(block_size, kv_dtype)
    return f"weights {_gib(loader.weight_bytes)}, and what steps need {_gib(held)}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
