"""The files of KV in one folder: which blocks they hold, within a number of bytes.

One thread at a time. Whatever is wrong with a file, the folder or the disk is told in words, once
for each kind of trouble, and ends in a miss. Files of others than this model's KV count, and are
removed in their turn; whatever has another name than such files have is left alone.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

from duetto.backends.blocks import Bytes
from duetto.core.files import UnfitFile, open_file
from duetto.core.tenant_lru import TenantLru
from duetto.runner.tiers.block_file import (
    BadBlockFile,
    Header,
    file_bytes,
    read_block,
    read_header,
    write,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{48}\.kv")
_UNFINISHED = ".unfinished-kv-"
_STALE_S = 3600.0  # an unfinished file that is older belongs to a process that died


class Folder:
    """Files under their names; a block is found by its key."""

    def __init__(self, path: Path, max_bytes: int, fingerprint: str, block_bytes: int) -> None:
        """Looks at what is there. `fingerprint` is of whatever makes KV another."""
        self.path = path
        self._max_bytes = max_bytes
        self._fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        self.block_bytes = block_bytes
        self._files = TenantLru[str]()
        self._keys_of: dict[str, tuple[bytes, ...]] = {}  # by file
        self._file_of: dict[bytes, str] = {}  # by key
        self._reported: set[str] = set()  # kinds of trouble
        self._dropped: list[bytes] = []  # keys, since they were asked for
        self.is_usable = True  # unless it cannot even be looked into
        self._look()

    @property
    def num_bytes(self) -> int:
        return self._files.total

    @property
    def keys(self) -> list[bytes]:
        return [*self._file_of]

    def take_dropped(self) -> tuple[bytes, ...]:
        """Keys that are here no more, since this was asked last."""
        dropped, self._dropped = self._dropped, []
        return tuple([key for key in dropped if key not in self._file_of])

    def read(self, keys: Sequence[bytes], outs: Sequence[Bytes]) -> tuple[int, str | None]:
        """How many of these blocks, from the first on, are in `outs` now; and why not all."""
        done = 0
        pairs = zip(keys, outs, strict=True)
        for name, group in groupby(pairs, key=lambda pair: self._file_of.get(pair[0])):
            if name is None:
                return done, "it is not there"
            try:
                with self._opened(name) as (descriptor, header):
                    for key, out in group:
                        if key not in header.keys:
                            raise BadBlockFile("holds other KV than its name says")
                        read_block(descriptor, header, header.keys.index(key), out)
                        done += 1
            except (BadBlockFile, UnfitFile) as error:
                return done, self._give_up(name, str(error))
            except OSError as error:
                self._drop(name)
                why = f"{self.path / name} cannot be read: {error.strerror}"
                return done, self._report(f"read {error.errno}", why)
            self._files.touch(name)
        return done, None

    def write(self, keys: Sequence[bytes], blocks: Bytes, tenant: bytes) -> str | None:
        """Keep blocks in a file. Why not, if it cannot be; nothing is left behind then."""
        return self._keep(keys, blocks, hashlib.sha256(tenant).hexdigest()[:16])

    def forget(self, keys: Sequence[bytes]) -> str | None:
        """Have no file with these blocks, those of other processes included. Why not, if one cannot
        be removed: it is used no more, but another start may find it.

        A file that holds others' blocks too is removed first and then written again without these:
        who is killed between the two has lost the others, which is a miss.
        """
        gone, why, is_any = frozenset(keys), None, False
        self._look_again()
        for name in [*self._keys_of]:
            if gone.isdisjoint(self._keys_of.get(name, ())):  # or it went for what was kept
                continue
            rest = self._rest_of(name, gone)
            error, is_any = self._remove(name), True
            why = why or error
            if rest is not None:
                self._keep(*rest)
        if is_any:
            self._sync()
        return why

    def _rest_of(self, name: str, gone: frozenset[bytes]) -> tuple[list[bytes], Bytes, str] | None:
        """What else a file holds that no other file does, and whose it is; None for nothing, or if
        it cannot be read."""
        held = self._keys_of[name]
        keys = [key for key in held if key not in gone and self._file_of.get(key) == name]
        if not keys:
            return None
        try:
            blocks = np.empty((len(keys), self.block_bytes), np.uint8)
            with self._opened(name, is_used=False) as (descriptor, header):
                for key, row in zip(keys, blocks, strict=True):
                    read_block(descriptor, header, header.keys.index(key), row)
        except (ValueError, OSError, MemoryError):
            return None
        return keys, blocks, header.tenant

    def _keep(self, keys: Sequence[bytes], blocks: Bytes, whose: str) -> str | None:
        name = f"{self._fingerprint}-{keys[0].hex()[:48]}.kv"
        size = file_bytes(len(keys), self.block_bytes)
        if size > self._max_bytes:
            return self._report(
                "size", f"{self.path}: {size} bytes of KV are more than it may have"
            )
        if name in self._files:
            self._drop(name)
        while self._files.total + size > self._max_bytes:
            self._remove(str(self._files.victim()))
        try:
            self._write_file(name, whose, keys, blocks)
        except OSError as error:
            why = f"{self.path} takes no more KV: {error.strerror or error}"
            return self._report(f"write {error.errno}", why)
        self._note(name, whose.encode(), size, keys)
        return None

    def _write_file(self, name: str, whose: str, keys: Sequence[bytes], blocks: Bytes) -> None:
        """Beside its place, then renamed, so that nobody sees half of one. It is not synced: what a
        power cut leaves of it fails its checksums, and is a miss."""
        with NamedTemporaryFile(dir=self.path, prefix=_UNFINISHED, delete=False) as file:
            try:
                write(file, self._fingerprint, whose, keys, blocks)
                Path(file.name).replace(self.path / name)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    @contextmanager
    def _opened(self, name: str, *, is_used: bool = True) -> Iterator[tuple[int, Header]]:
        """A file of this model's KV. Raises BadBlockFile, UnfitFile or OSError if it is none."""
        descriptor = open_file(self.path / name, is_private=True)
        try:
            header = read_header(descriptor)
            if header.fingerprint != self._fingerprint or header.block_bytes != self.block_bytes:
                raise BadBlockFile("holds other KV than its name says")
            yield descriptor, header
            if is_used:
                with suppress(OSError):  # of a folder that may only be read
                    os.utime(descriptor)  # others go first, after a restart too
        finally:
            os.close(descriptor)

    # --- what is there ---------------------------------------------------------------------

    def _look(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = sorted(self._found())
        except OSError as error:
            self.is_usable = False
            self._report("folder", f"{self.path} cannot be used for KV: {error.strerror}")
            return
        self._admit_all(found)
        self._dropped = []

    def _look_again(self) -> None:
        """Other processes may write here too."""
        with suppress(OSError):
            self._admit_all([each for each in sorted(self._found()) if each[1] not in self._files])

    def _admit_all(self, found: Sequence[tuple[float, str, int]]) -> None:
        for _, name, size in found:
            if name.startswith(self._fingerprint):
                self._admit(name, size)
            else:
                self._note(name, name[:16].encode(), size, ())
        while self._files.total > self._max_bytes:
            self._remove(str(self._files.victim()))

    def _found(self) -> Iterator[tuple[float, str, int]]:
        """Last use, name and size of files like ours; removes what somebody died over."""
        stale_before = time.time() - _STALE_S
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(OSError):  # another process removes it
                    status = entry.stat(follow_symlinks=False)
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        yield status.st_mtime, entry.name, status.st_size
                    elif entry.name.startswith(_UNFINISHED) and status.st_mtime < stale_before:
                        Path(entry.path).unlink()

    def _admit(self, name: str, size: int) -> None:
        """A file with our name, if its header is right."""
        try:
            with self._opened(name, is_used=False) as (_, header):
                pass
        except (BadBlockFile, UnfitFile) as error:
            self._give_up(name, str(error))
        except OSError as error:
            self._report("unreadable", f"{self.path / name} cannot be read: {error.strerror}")
        else:
            self._note(name, header.tenant.encode(), size, header.keys)

    def _note(self, name: str, tenant: bytes, size: int, keys: Sequence[bytes]) -> None:
        self._files.add(name, tenant, size)
        self._keys_of[name] = tuple(keys)
        for key in keys:
            self._file_of[key] = name

    def _drop(self, name: str) -> None:
        """Know a file no more."""
        self._files.remove(name)
        for key in self._keys_of.pop(name):
            if self._file_of.get(key) == name:
                del self._file_of[key]
                self._dropped.append(key)

    def _remove(self, name: str) -> str | None:
        """Why not, if it cannot be; it is known no more all the same."""
        self._drop(name)
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            why = f"{self.path / name} cannot be removed: {error.strerror}"
            return self._report("remove", why)
        return None

    def _sync(self) -> None:
        """What was removed stays so after a power cut."""
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _give_up(self, name: str, why: str) -> str:
        """A file that is of no use is a miss from now on, and goes."""
        told = self._report("damaged", f"{self.path / name} {why}; it is removed, and not used")
        if name in self._files:
            self._drop(name)
        with suppress(OSError):
            (self.path / name).unlink(missing_ok=True)
        return told

    def _report(self, kind: str, message: str) -> str:
        if kind not in self._reported:
            self._reported.add(kind)
            logger.warning("%s (told once)", message)
        return message
