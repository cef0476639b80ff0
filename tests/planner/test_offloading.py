"""`--kv-offloading-...` of what is simulated: sizes, speeds, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
from pricing.prices import A100, ROUGH, program

from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout
from duetto.pricing.gpus import HARDWARE
from duetto.pricing.hardware import HardwareSpec
from duetto.runner.tiers.load import open_room
from duetto.simulation.tiers import TierSpec

GIB = 2**30
RAM: dict[str, Any] = {"kv_offloading_size": 64.0}
DISK: dict[str, Any] = {"kv_offloading_disk_size": 500.0}


def tiers_of(hardware: HardwareSpec = A100, **flags: Any) -> TierSpec:
    found = make_fleet(program("llama-3-8b"), hardware, Layout(**flags)).replica.tiers
    assert found is not None
    return found


def test_without_flags_there_are_none() -> None:
    assert make_fleet(program("llama-3-8b"), A100, Layout()).replica.tiers is None


def test_sizes_are_the_servers() -> None:
    """RAM as it was asked for, or a part of the arena for a disk to load through."""
    block_bytes = 32 * 131072  # of llama-3-8b in 16 bits: 128 KiB a token
    for flags in (RAM, DISK, RAM | DISK):
        fleet = make_fleet(program("llama-3-8b"), A100, Layout(**flags))
        args = EngineArgs(
            kv_offloading_size=flags.get("kv_offloading_size"), kv_offloading_disk="unused"
        )
        config = fleet.replica.scheduler
        room = open_room(
            replace(args, kv_offloading_disk=None) if flags == RAM else args,
            config.num_blocks,
            block_bytes,
            ["kv"],
            longest=config.num_blocks_for(config.max_model_len),
        )
        found = fleet.replica.tiers
        assert found is not None and room is not None
        assert (found.num_ram_blocks, found.block_bytes) == (room.num_slots, block_bytes)
    assert found.disk is not None and found.disk.max_bytes == 500 * GIB


def test_speeds_are_the_hardwares_or_those_of_the_flags() -> None:
    for spec in HARDWARE.values():
        assert 20e9 < spec.host_bandwidth < 64e9
        assert spec.disk_write_bandwidth < spec.disk_read_bandwidth < 8e9
    one, two = tiers_of(**RAM, **DISK), tiers_of(**RAM, **DISK, tp=2)
    assert one.copy_bytes_per_s == A100.host_bandwidth == two.copy_bytes_per_s / 2
    assert one.block_bytes == two.block_bytes
    assert one.disk is not None
    assert one.disk.read_bytes_per_s == A100.disk_read_bandwidth
    assert one.disk.write_bytes_per_s == A100.disk_write_bandwidth
    asked = {"host_bandwidth": 2.0, "disk_read_bandwidth": 3.0, "disk_write_bandwidth": 0.5}
    slow = tiers_of(**RAM, **DISK, **asked)
    assert slow.copy_bytes_per_s == 2e9 and slow.disk is not None
    assert (slow.disk.read_bytes_per_s, slow.disk.write_bytes_per_s) == (3e9, 0.5e9)


def test_on_this_host_a_copy_reads_and_writes_memory() -> None:
    host = replace(ROUGH, name="host", memory_bytes=64 * GIB)
    reached = ROUGH.reached("bfloat16").copy.memory
    found = tiers_of(host, **RAM)
    assert found.copy_bytes_per_s == pytest.approx(ROUGH.memory_bandwidth * reached / 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv_offloading_size": 0.0}, "--kv-offloading-size: must be GiB above 0, up to 1,048,576"),
        ({"kv_offloading_disk_size": -1.0}, "--kv-offloading-disk-size: must be GiB above 0"),
        ({"kv_offloading_size": 1e-6}, "--kv-offloading-size 1e-06: must hold 4 blocks of 4194304"),
        ({"host_bandwidth": 1.0}, "--host-bandwidth: needs --kv-offloading-size or --kv-off"),
        (RAM | {"disk_read_bandwidth": 1.0}, "-bandwidth: needs --kv-offloading-disk-size"),
        (DISK | {"disk_write_bandwidth": 0.0}, "--disk-write-bandwidth 0.0: must be above 0"),
        (RAM | {"enable_prefix_caching": False}, "keep what --enable-prefix-caching finds"),
        (DISK | {"pp": 2}, "--kv-offloading-disk-size with --pp: not simulated"),
        (RAM | {"prefill_replicas": 1}, "--kv-offloading-size with --prefill-replicas: not"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiers_of(**flags)
    assert message in str(refused.value)


def test_what_is_not_known_of_the_hardware_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"fast it copies to RAM; say so with --host-bandwidth"):
        tiers_of(replace(A100, host_bandwidth=0.0), **RAM)
    host = replace(ROUGH, name="host", memory_bytes=64 * GIB)
    with pytest.raises(ConfigError, match=r"nothing is known of the disk of host; say how fast"):
        tiers_of(host, **DISK)
    assert tiers_of(host, **DISK, disk_read_bandwidth=1.0, disk_write_bandwidth=1.0).disk


def test_a_layout_tells_its_tiers() -> None:
    layout = Layout(**RAM, **DISK)
    words = "KV in 64 GiB of RAM, KV on 500 GiB of disk"
    assert layout.describe().endswith(words) and layout.on_devices(A100).endswith(words)
