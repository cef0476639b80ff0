"""What of this machine is given to KV beside the arena, from the options of an engine."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import duetto.backends
from duetto.backends.cpu.native import native, why_unavailable
from duetto.core.engine_args import EngineArgs
from duetto.core.offloading import DISK_GIB, GIB, num_ram_slots
from duetto.program.program import Program
from duetto.runner.tiers.disk import DiskTier
from duetto.runner.tiers.folder import Folder
from duetto.runner.tiers.mover import TierRoom


def reserved_bytes(args: EngineArgs) -> int:
    """Of memory, for KV that leaves the arena, where that was asked for."""
    return int((args.kv_offloading_size or 0.0) * GIB)


def open_room(
    args: EngineArgs,
    num_blocks: int,
    block_bytes: int,
    fingerprints: Sequence[str],
    *,
    longest: int,
) -> TierRoom | None:
    """The tiers that `args` ask for beside an arena; None for none. `fingerprints`: whatever makes
    KV another; `longest`: blocks of the longest request. Raises ConfigError, naming the flag, for
    what holds too little to be of use."""
    if args.kv_offloading_size is None and args.kv_offloading_disk is None:
        return None
    num_slots = num_ram_slots(args.kv_offloading_size, num_blocks, block_bytes, longest)
    if args.kv_offloading_disk is None:
        return TierRoom(num_slots, block_bytes)
    max_bytes = int((args.kv_offloading_disk_size or DISK_GIB) * GIB)
    folder = Folder(
        Path(args.kv_offloading_disk).expanduser(), max_bytes, "/".join(fingerprints), block_bytes
    )
    return TierRoom(num_slots, block_bytes, DiskTier(folder))


def fingerprint_of(program: Program) -> str:
    """Of what computes: the operations, and the very code that runs them."""
    digest = hashlib.sha256(repr((program.ops, program.kv, np.__version__)).encode())
    files = sorted(Path(duetto.backends.__path__[0]).rglob("*.py"))
    if why_unavailable() is None:
        files.append(Path(native.__file__))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def tiers_in_words(room: TierRoom, args: EngineArgs) -> str:
    """For people."""
    ram = room.num_slots * room.block_bytes
    told = f"KV that leaves the cache goes to {ram / 2**20:.1f} MiB of RAM"
    if room.disk is None:
        return told
    folder = room.disk.folder
    if not folder.is_usable:
        return f"{told}, and not to {folder.path}, which cannot be used"
    limit = args.kv_offloading_disk_size or DISK_GIB
    return (
        f"{told}, and to {folder.path}: {folder.num_bytes / GIB:.2f} of {limit:g} GiB used, "
        f"{len(folder.keys)} blocks of this model found"
    )
