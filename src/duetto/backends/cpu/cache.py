"""Packed weights on disk, so that a second start need not quantize again.

A file is one arena: a header (what it is, and an XXH64 checksum of every 4 MiB), then the bytes as
they lie in memory. It is written beside its place, synced and renamed, so that no reader sees half
of one, and of two writers the later wins. Nothing that is wrong with a file, its directory or the
disk stops a start: whoever asks gets the reason, and goes on without. Knows bytes and a key; not
what they mean.
"""

import json
import os
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from tempfile import NamedTemporaryFile
from typing import IO

import numpy as np

from duetto.backends.blocks import Bytes
from duetto.backends.cpu.native import native
from duetto.core.files import UnfitFile, open_file

SUFFIX = ".packed"
MAX_FILES = 4  # the most recently used ones stay
MAX_SHARE = 0.25  # of what is free on the disk, that one file may take
_MAGIC = b"duettopk"
_HEAD = struct.Struct("<8sQQ")  # magic; length and checksum of the JSON that follows
_PAGE = 4096  # the body begins at a multiple
_CHUNK_BYTES = 4 << 20  # checksummed by itself; small enough to be still in the cache then
_MAX_HEADER_BYTES = 16 << 20
_UNFINISHED = ".unfinished-"
_STALE_S = 3600.0  # an unfinished file that is older belongs to a process that died


class CacheUnusable(Exception):
    """A file is there and cannot be used, or none can be written; the message says why."""


@dataclass(frozen=True, slots=True)
class PackedCache:
    """The files in one directory, each under its key: a name that says all it depends on."""

    directory: Path
    num_threads: int = 2
    max_files: int = MAX_FILES

    def file(self, key: str) -> Path:
        return self.directory / f"{key}{SUFFIX}"

    def read(self, key: str, arena: Bytes) -> bool:
        """Fill `arena`. False if there is no such file; it then is as it was.

        Raises CacheUnusable if there is one, but truncated, damaged, foreign or not readable:
        the arena then holds anything.
        """
        try:
            descriptor = open_file(self.file(key), is_private=True)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except UnfitFile as error:
            raise CacheUnusable(f"{self.file(key)} cannot be read: it {error}") from None
        except OSError as error:
            raise CacheUnusable(f"{self.file(key)} cannot be read: {error.strerror}") from None
        try:
            start, checksums = _read_header(descriptor, key, len(arena))
            self._read_body(descriptor, start, checksums, arena)
            with suppress(OSError):  # of a file or disk that may only be read
                os.utime(descriptor)  # it was used: others go first
        except (OSError, ValueError) as error:
            raise CacheUnusable(f"{self.file(key)} is damaged ({error})") from None
        finally:
            os.close(descriptor)
        return True

    def write(self, key: str, arena: Bytes) -> None:
        """Keep a copy of `arena`, and remove the files that were not used for longest.

        Raises CacheUnusable if that cannot be done; nothing is left behind then.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            free = disk_usage(self.directory).free
            if len(arena) > MAX_SHARE * free:
                raise OSError(
                    f"{len(arena) / 2**20:.0f} MiB are more than a quarter of the "
                    f"{free / 2**20:.0f} MiB that are free"
                )
            with NamedTemporaryFile(dir=self.directory, prefix=_UNFINISHED, delete=False) as file:
                try:
                    self._write_all(file, key, arena)
                    Path(file.name).replace(self.file(key))
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            self._remove_old()
        except OSError as error:
            raise CacheUnusable(
                f"{self.directory} takes no copy of them: {error.strerror or error}"
            ) from None

    def _read_body(
        self, descriptor: int, start: int, checksums: Sequence[int], arena: Bytes
    ) -> None:
        def is_whole(index: int) -> bool:
            begin = index * _CHUNK_BYTES
            chunk = arena[begin : begin + _CHUNK_BYTES]
            done = 0
            while done < len(chunk):
                count = os.preadv(descriptor, [chunk[done:].data], start + begin + done)
                if count == 0:
                    return False
                done += count
            return native.checksum(chunk) == checksums[index]

        with ThreadPoolExecutor(self.num_threads) as threads:
            if not all(threads.map(is_whole, range(len(checksums)))):
                raise ValueError("its checksums are not those of its bytes")

    def _write_all(self, file: IO[bytes], key: str, arena: Bytes) -> None:
        chunks = [arena[i : i + _CHUNK_BYTES] for i in range(0, len(arena), _CHUNK_BYTES)]
        with ThreadPoolExecutor(self.num_threads) as threads:
            checksums = list(threads.map(native.checksum, chunks))
        header = _header(key, len(arena), checksums)
        if hasattr(os, "posix_fallocate"):  # a full disk shows at once
            os.posix_fallocate(file.fileno(), 0, len(header) + len(arena))
        file.write(header)
        for chunk in chunks:
            file.write(chunk.data)
        file.flush()
        os.fsync(file.fileno())

    def _remove_old(self) -> None:
        """All but the most recently used files, and what dead writers have left."""
        files = [(_time_used(file), file) for file in self.directory.glob(f"*{SUFFIX}")]
        old = [file for _, file in sorted(files, reverse=True)[self.max_files :]]
        stale_before = time.time() - _STALE_S
        left = [
            file
            for file in self.directory.glob(f"{_UNFINISHED}*")
            if _time_used(file) < stale_before
        ]
        for file in (*old, *left):
            with suppress(OSError):  # another process may have removed it, or own it
                file.unlink()


def _checksum(text: bytes) -> int:
    return native.checksum(np.frombuffer(text, np.uint8))


def _header(key: str, num_bytes: int, checksums: Sequence[int]) -> bytes:
    text = json.dumps({"key": key, "num_bytes": num_bytes, "checksums": checksums}).encode()
    header = _HEAD.pack(_MAGIC, len(text), _checksum(text)) + text
    return header + bytes(-len(header) % _PAGE)


def _read_header(descriptor: int, key: str, num_bytes: int) -> tuple[int, list[int]]:
    """Where the body begins, and its checksums. Raises ValueError if this is not the file."""
    head = os.pread(descriptor, _HEAD.size, 0)
    if len(head) < _HEAD.size:
        raise ValueError("too short")
    magic, length, checksum = _HEAD.unpack(head)
    if magic != _MAGIC or length > _MAX_HEADER_BYTES:
        raise ValueError("not a file of packed weights")
    text = os.pread(descriptor, length, _HEAD.size)
    if _checksum(text) != checksum:
        raise ValueError("its header's checksum is wrong")
    header = json.loads(text)
    if not isinstance(header, dict) or not header.keys() >= {"key", "num_bytes", "checksums"}:
        raise ValueError("its header is of another version")
    start = (_HEAD.size + length + _PAGE - 1) // _PAGE * _PAGE
    if (header["key"], header["num_bytes"]) != (key, num_bytes):
        raise ValueError("it holds other weights")
    if os.fstat(descriptor).st_size != start + num_bytes:
        raise ValueError("truncated")
    checksums: list[int] = header["checksums"]
    if len(checksums) != -(-num_bytes // _CHUNK_BYTES):
        raise ValueError("it lacks checksums")
    return start, checksums


def _time_used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # gone in the meantime
        return 0.0
