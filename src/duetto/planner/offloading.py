"""What `--kv-offloading-...` mean for what is simulated: how large the tiers of a replica are, and
how fast its copies and its disk. Simulates nothing."""

from typing import Protocol

from duetto.core.errors import ConfigError
from duetto.core.offloading import GIB, num_ram_slots
from duetto.pricing.cost_model import CostModel
from duetto.pricing.find_hardware import HOST
from duetto.simulation.disk import DiskSpec
from duetto.simulation.tiers import TierSpec


class OffloadingOptions(Protocol):
    @property
    def has_tiers(self) -> bool: ...
    @property
    def kv_offloading_size(self) -> float | None: ...
    @property
    def kv_offloading_disk_size(self) -> float | None: ...
    @property
    def host_bandwidth(self) -> float | None: ...
    @property
    def disk_read_bandwidth(self) -> float | None: ...
    @property
    def disk_write_bandwidth(self) -> float | None: ...
    @property
    def block_size(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def prefill_replicas(self) -> int: ...


def simulated_tiers(
    model: CostModel, options: OffloadingOptions, num_blocks: int, longest: int
) -> TierSpec | None:
    """Beside an arena of `num_blocks`, for requests of up to `longest`; None without tiers. Raises
    ConfigError, naming the flag."""
    if not options.has_tiers:
        return None
    for flag, is_there in (
        ("--pp", options.pp > 1),
        ("--prefill-replicas", options.prefill_replicas > 0),
    ):
        if is_there:
            raise ConfigError(f"{_flag(options)} with {flag}: not simulated; leave one of them out")
    kv_bytes = model.deployment.precision.kv_bytes
    block_bytes = int(model.program.kv_bytes_per_token(kv_bytes) * options.block_size)
    return TierSpec(
        num_ram_blocks=num_ram_slots(options.kv_offloading_size, num_blocks, block_bytes, longest),
        block_bytes=block_bytes,
        copy_bytes_per_s=_copy_bandwidth(model, options),
        disk=_disk(model, options),
    )


def _flag(options: OffloadingOptions) -> str:
    is_ram = options.kv_offloading_size is not None
    return "--kv-offloading-size" if is_ram else "--kv-offloading-disk-size"


def _copy_bandwidth(model: CostModel, options: OffloadingOptions) -> float:
    """Each rank moves its own heads' KV over a link of its own. Where the arena is RAM, its bytes
    are read and written there, as fast as a kernel that copies does either."""
    hardware, deployment = model.hardware, model.deployment
    if options.host_bandwidth is not None:
        return options.host_bandwidth * 1e9 * deployment.tensor_parallel
    if hardware.host_bandwidth:
        return hardware.host_bandwidth * deployment.tensor_parallel
    if hardware.name != HOST:
        raise ConfigError(
            f"{_flag(options)}: of {hardware.name} it is not known how fast it copies to RAM; say "
            f"so with --host-bandwidth GB/S"
        )
    reached = hardware.reached(deployment.arithmetic).of("copy").memory
    return hardware.memory_bandwidth * reached / 2


def _disk(model: CostModel, options: OffloadingOptions) -> DiskSpec | None:
    if options.kv_offloading_disk_size is None:
        return None
    hardware = model.hardware
    speeds: dict[str, float] = {}
    for way in ("read", "write"):
        asked = getattr(options, f"disk_{way}_bandwidth")
        speeds[way] = getattr(hardware, f"disk_{way}_bandwidth") if asked is None else asked * 1e9
        if not speeds[way]:
            raise ConfigError(
                f"--kv-offloading-disk-size: nothing is known of the disk of {hardware.name}; say "
                f"how fast it is with --disk-read-bandwidth and --disk-write-bandwidth GB/S"
            )
    return DiskSpec(
        max_bytes=int(options.kv_offloading_disk_size * GIB),
        read_bytes_per_s=speeds["read"],
        write_bytes_per_s=speeds["write"],
    )
