"""How fast KV links move rows of blocks between two processes of this machine, beside a copy of as
many rows in one process. In turns: copy, shared memory, TCP; the ratio is of each turn.

    python benchmarks/cluster/links.py [--rows 512,4096,16384,65536] [--turns 5] [--mib 512]

Rows lie in any order in an arena that no cache holds. JSON on the last line.
"""

import argparse
import json
import subprocess
import sys
from queue import SimpleQueue
from statistics import median
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np

from duetto.cluster.links.choose import connect_link, listen_for_links
from duetto.cluster.links.link import BlockRows, LinkLost, RowsSent
from duetto.cluster.links.rows import copy_block_rows

KINDS = ("shm://*", "tcp://127.0.0.1:*")
ARENA_BYTES = 256 << 20
CALL_BYTES = 4 << 20  # one layer's blocks of a chunk of a prompt, say


def arena_of(row_bytes: int, seed: int) -> BlockRows:
    """All of its blocks, in any order."""
    blocks = np.random.default_rng(seed).permutation(ARENA_BYTES // row_bytes).astype(np.int32)
    return BlockRows([np.full((len(blocks), row_bytes), seed, np.uint8)], blocks)


class Sender:
    """The other process: sends as much as it is asked for."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[bytes] = SimpleQueue()

    def received(self, frame: bytes) -> None:
        self.asked.put(frame)

    def places(self, rows: RowsSent) -> None: ...

    def arrived(self, rows: RowsSent) -> None: ...

    def lost(self, _: str) -> None:
        self.asked.put(b"")


def serve(address: str, row_bytes: int) -> None:
    user = Sender()
    link = connect_link(address, user)
    arena = arena_of(row_bytes, 7)
    at_a_time = CALL_BYTES // row_bytes
    link.send(b"here")
    try:
        while asked := user.asked.get():
            for _ in range(int(asked) // ARENA_BYTES):
                for first in range(0, len(arena.blocks), at_a_time):
                    part = arena.part(first, at_a_time)
                    link.send_rows(RowsSent(0, 0, first, len(part.blocks)), part)
            link.send(b"done")
    except LinkLost:
        pass


class Receiver:
    def __init__(self, kind: str, row_bytes: int) -> None:
        self.arena = arena_of(row_bytes, 1)
        self._done = Event()
        self._end: Any = None
        self._listener = listen_for_links(kind, self._accept)
        command = [sys.executable, __file__, "--serve", self._listener.address]
        self._process = subprocess.Popen([*command, "--rows", str(row_bytes)])
        self._wait()

    def _accept(self, end: Any) -> "Receiver":
        self._end = end
        return self

    def received(self, _: bytes) -> None:
        self._done.set()

    def places(self, rows: RowsSent) -> BlockRows:
        return self.arena.part(rows.first, rows.num_blocks)

    def arrived(self, rows: RowsSent) -> None: ...

    def lost(self, reason: str) -> None:
        print(f"lost: {reason}", file=sys.stderr)
        self._done.set()

    def _wait(self) -> None:
        self._done.wait()
        self._done.clear()

    def seconds(self, num_bytes: int) -> float:
        start = perf_counter()
        self._end.send(b"%d" % num_bytes)
        self._wait()
        return perf_counter() - start

    def close(self) -> None:
        assert (self.arena.arrays[0] == 7).all(), "something did not come"
        self._end.close()
        self._listener.close()
        self._process.wait()


def copy_seconds(source: BlockRows, to: BlockRows, num_bytes: int) -> float:
    """By one thread, rows as a link sends them."""
    start = perf_counter()
    for _ in range(num_bytes // ARENA_BYTES):
        copy_block_rows(source, to)
    return perf_counter() - start


def measure(row_bytes: int, turns: int, num_bytes: int) -> dict[str, Any]:
    source = arena_of(row_bytes, 2)
    receivers = {kind.partition(":")[0]: Receiver(kind, row_bytes) for kind in KINDS}
    to = receivers["shm"].arena
    found: dict[str, list[float]] = {"copy": [], **{name: [] for name in receivers}}
    for turn in range(turns + 1):
        taken = {"copy": copy_seconds(source, to, num_bytes)}
        taken |= {name: one.seconds(num_bytes) for name, one in receivers.items()}
        for name, seconds in taken.items() if turn else ():  # the first touches memory
            found[name].append(num_bytes / seconds / 1e9)
    for one in receivers.values():
        one.close()
    row: dict[str, Any] = {"row_bytes": row_bytes}
    for name, speeds in found.items():
        row[f"{name}_gb_s"] = round(median(speeds), 2)
    for name in receivers:
        ratios = [a / b for a, b in zip(found[name], found["copy"], strict=True)]
        row[f"{name}_of_copy"] = round(median(ratios), 3)
        row[f"{name}_of_copy_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="512,4096,16384,65536")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = [int(size) for size in given.rows.split(",")]
    if given.serve:
        serve(given.serve, sizes[0])
        return
    rows = []
    for size in sizes:
        rows.append(measure(size, given.turns, given.mib << 20))
        print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "links", "turns": given.turns, "mib": given.mib, "rows": rows}))


if __name__ == "__main__":
    main()
