"""How fast KV is read back from the disk tier, beside what the disk gives.

    python benchmarks/tiers_disk.py
    python benchmarks/tiers_disk.py --mib 16 --rounds 2

Files of some blocks each are written through the tier's thread. Then, in turns, they are read by
it (header, checksums, into rows of RAM) and plainly (os.readv into a buffer, nothing checked), each
time after the kernel was told to forget them (POSIX_FADV_DONTNEED). A second pair reads what the
kernel still has. The last line of stdout is one JSON document.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from in_process import machine, today

from duetto.core.batch import BlockMove
from duetto.runner.tiers.disk import DiskTier
from duetto.runner.tiers.folder import Folder

BLOCK_BYTES = 2**20  # 32 tokens of a 1.2 B model in bf16
PER_FILE = 8  # what one read brings (scheduler/tiers.py, MAX_RUN)


def forget_cached(folder: Path) -> None:
    for path in folder.glob("*.kv"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(folder: Path, rows: np.ndarray[Any, Any]) -> float:
    paths, start = sorted(folder.glob("*.kv")), perf_counter()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        view, at = memoryview(rows).cast("B"), 0
        while (count := os.readv(descriptor, [view[at:]])) > 0:
            at += count
        os.close(descriptor)
    return perf_counter() - start


def read_through(
    disk: DiskTier, runs: list[tuple[bytes, ...]], rows: np.ndarray[Any, Any]
) -> float:
    start = perf_counter()
    for number, keys in enumerate(runs):
        places = tuple(range(PER_FILE))
        disk.read(BlockMove(number, "disk", "ram", keys, (), places), list(rows[:PER_FILE]))
    assert disk.flush(300)
    results = disk.take_results()
    assert all(result.num_done == PER_FILE for result in results), results
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is meant; by default a temporary one"
    )
    options = parser.parse_args()
    num_files = max(1, options.mib * 2**20 // (BLOCK_BYTES * PER_FILE))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        path = Path(name)
        disk = DiskTier(Folder(path, 2**40, "bench", BLOCK_BYTES))
        runs = [
            tuple(f"{file:08}{block:08}".encode() * 2 for block in range(PER_FILE))
            for file in range(num_files)
        ]
        for number, keys in enumerate(runs):
            blocks = rng.integers(0, 256, (PER_FILE, BLOCK_BYTES), dtype=np.uint8)
            disk.write(BlockMove(number, "arena", "disk", keys, tuple(range(PER_FILE)), ()), blocks)
            assert disk.flush(300)
        disk.take_results()
        rows = np.zeros((PER_FILE + 1, BLOCK_BYTES), np.uint8)
        found: dict[str, dict[str, list[float]]] = {}
        for kind in ("from the disk", "from the kernel's cache"):
            times = found.setdefault(kind, {"tier": [], "plain": []})
            for _ in range(options.rounds + 1):
                for reader in ("tier", "plain"):
                    if kind == "from the disk":
                        forget_cached(path)
                    times[reader].append(
                        read_through(disk, runs, rows)
                        if reader == "tier"
                        else read_plainly(path, rows)
                    )
    size = num_files * PER_FILE * BLOCK_BYTES
    rows_found = {}
    for kind, times in found.items():
        ratios = [p / t for t, p in zip(times["tier"][1:], times["plain"][1:], strict=True)]
        rows_found[kind] = {
            "tier_gb_s": size / statistics.median(times["tier"][1:]) / 1e9,
            "plain_gb_s": size / statistics.median(times["plain"][1:]) / 1e9,
            "of_plain": statistics.median(ratios),
        }
        shown = rows_found[kind]
        print(
            f"{kind}: {shown['tier_gb_s']:.2f} GB/s through the tier, {shown['plain_gb_s']:.2f} "
            f"plainly: {shown['of_plain']:.0%}"
        )
    print(
        json.dumps({"benchmark": "tiers_disk", "date": today(), "machine": machine(), **rows_found})
    )


if __name__ == "__main__":
    main()
